//! Bytes that were read and not used yet.

use std::{
    cell::RefCell,
    io,
    ops::{Deref, DerefMut},
};

use tokio::{io::Interest, net::TcpStream};

const SMALL: usize = 8 << 10;
const LARGE: usize = 64 << 10;
/// Small buffers that a thread keeps for later.
const KEPT: usize = 64;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that were read and not used yet. Takes memory only while it holds some.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    /// The last read filled it.
    greedy: bool,
}

impl Buffer {
    /// What was read.
    pub(crate) fn data(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Lets go of bytes that were used.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            self.bytes.clear();
            self.start = 0;
            give_back(&mut self.bytes);
        }
    }

    /// Takes no more memory than what is left needs.
    pub(crate) fn shrink(&mut self) {
        if self.bytes.capacity() > SMALL && self.data().len() <= SMALL {
            let mut small = take_one();
            small.extend_from_slice(self.data());
            (self.bytes, self.start) = (small, 0);
        }
    }

    /// Reads more; 0 at the end of the stream. May be dropped at any time.
    ///
    /// # Errors
    ///
    /// As the stream's.
    pub(crate) async fn fill(&mut self, stream: &TcpStream) -> io::Result<usize> {
        loop {
            stream.readable().await?;
            if let Some(count) = self.take(stream)? {
                return Ok(count);
            }
        }
    }

    /// Reads what is there; 0 at the end of the stream, `None` where nothing is there yet.
    ///
    /// # Errors
    ///
    /// As the stream's.
    pub(crate) fn take(&mut self, stream: &TcpStream) -> io::Result<Option<usize>> {
        self.make_room();
        match stream.try_read_buf(&mut self.bytes) {
            Ok(count) => {
                self.greedy = self.bytes.len() == self.bytes.capacity();
                if !self.greedy {
                    drained(stream);
                }
                if self.is_empty() {
                    self.consume(0);
                }
                Ok(Some(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.consume(0);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn make_room(&mut self) {
        if self.bytes.capacity() == 0 {
            self.bytes = take_one();
        }
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let most = if self.greedy { LARGE } else { SMALL };
        if self.bytes.len() == self.bytes.capacity() || self.bytes.capacity() < most && self.greedy
        {
            self.bytes.reserve(most.max(self.bytes.len()));
        }
    }
}

/// Tells the runtime that nothing is left to read, as its own readers do after a short read
/// (epoll(7), questions and answers): otherwise each wait would begin with a call that finds
/// nothing. What comes from now on is a new event, which this thread, that of the stream's runtime,
/// sees later. Only urgent data, of which HTTP knows nothing, may wait for what follows it.
fn drained(stream: &TcpStream) {
    _ = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}

fn take_one() -> Vec<u8> {
    let kept = FREE.with_borrow_mut(Vec::pop);
    kept.unwrap_or_else(|| Vec::with_capacity(SMALL))
}

/// Room to write something in, which takes no memory before it is made nor once it is dropped.
pub(crate) struct Room(Vec<u8>);

impl Room {
    pub(crate) fn new() -> Self {
        Self(take_one())
    }
}

impl Deref for Room {
    type Target = Vec<u8>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.clear();
        give_back(&mut self.0);
    }
}

fn give_back(bytes: &mut Vec<u8>) {
    let bytes = std::mem::take(bytes);
    if bytes.capacity() != SMALL {
        return;
    }
    FREE.with_borrow_mut(|free| {
        if free.len() < KEPT {
            free.push(bytes);
        }
    });
}

/// Writes all of the bytes.
///
/// # Errors
///
/// As the stream's.
pub(crate) async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
