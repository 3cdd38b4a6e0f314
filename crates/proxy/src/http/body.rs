//! Bodies over HTTP/1: where they end.

use super::syntax::{Fields, MOST_FIELDS, Malformed, is_value, write_number};

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// By its length.
    Length(u64),
    /// By a chunk of length 0.
    Chunked,
    /// By the end of the connection; answers only.
    UntilClose,
}

impl Framing {
    /// The length, where that is known beforehand and memory can hold so much.
    #[must_use]
    pub fn of_length(self) -> Option<usize> {
        match self {
            Self::None => Some(0),
            Self::Length(length) => usize::try_from(length).ok(),
            Self::Chunked | Self::UntilClose => None,
        }
    }

    /// Writes the field that tells it.
    pub fn write(self, out: &mut Vec<u8>) {
        match self {
            Self::None | Self::UntilClose => {}
            Self::Length(length) => {
                out.extend_from_slice(b"content-length: ");
                write_number(out, length);
                out.extend_from_slice(b"\r\n");
            }
            Self::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        }
    }
}

/// Longest line of a chunk's size with its extensions.
const MOST_SIZE_LINE: usize = 4 << 10;
/// Longest trailers.
const MOST_TRAILERS: usize = 8 << 10;

/// Reads a body from bytes as they come.
#[derive(Debug)]
pub struct Reader {
    state: State,
    trailers: Fields,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Length(u64),
    Size,
    Chunk(u64),
    AfterChunk,
    Trailers,
    UntilClose,
    End,
}

/// What bytes are.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A part of the body.
    Data(&'a [u8]),
    /// More bytes are needed.
    More,
    /// The body is complete.
    End,
}

impl Reader {
    /// Begins a body.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::End,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state, trailers: Fields::default() }
    }

    /// The next piece, and how many bytes are done with.
    ///
    /// # Errors
    ///
    /// It is not certain where the body ends.
    pub fn next<'a>(&mut self, bytes: &'a [u8]) -> Result<(usize, Piece<'a>), Malformed> {
        let mut done = 0;
        loop {
            let rest = &bytes[done..];
            let step = match self.state {
                State::End => return Ok((done, Piece::End)),
                State::UntilClose | State::Length(_) | State::Chunk(_) if rest.is_empty() => None,
                State::UntilClose => return Ok((bytes.len(), Piece::Data(rest))),
                State::Length(left) | State::Chunk(left) => {
                    let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    self.state = self.after(left - length as u64);
                    return Ok((done + length, Piece::Data(&rest[..length])));
                }
                State::Size => self.read_size(rest)?,
                State::AfterChunk => self.read_end_of_chunk(rest)?,
                State::Trailers => self.read_trailers(rest)?,
            };
            let Some(step) = step else { return Ok((done, Piece::More)) };
            done += step;
        }
    }

    /// Whether the end of the connection is the end of the body.
    #[must_use]
    pub fn may_end(&self) -> bool {
        matches!(self.state, State::End | State::UntilClose)
    }

    /// Whether the body is complete.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.state == State::End
    }

    /// Fields after the last chunk.
    #[must_use]
    pub fn trailers(&self) -> &Fields {
        &self.trailers
    }

    const fn after(&self, left: u64) -> State {
        match (self.state, left) {
            (State::Length(_), 0) => State::End,
            (State::Length(_), left) => State::Length(left),
            (_, 0) => State::AfterChunk,
            (_, left) => State::Chunk(left),
        }
    }

    fn read_size(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let end = memchr::memchr(b'\n', bytes);
        if end.unwrap_or(bytes.len()) > MOST_SIZE_LINE {
            return Err(Malformed::bad("a chunk's extensions are too long"));
        }
        let Some(end) = end else { return Ok(None) };
        let line = bytes[..end].strip_suffix(b"\r");
        let line = line.ok_or(Malformed::bad("a line ends without CR"))?;
        self.state = match read_chunk_size(line)? {
            0 => State::Trailers,
            size => State::Chunk(size),
        };
        Ok(Some(end + 1))
    }

    fn read_end_of_chunk(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        match bytes {
            [] | [b'\r'] => Ok(None),
            [b'\r', b'\n', ..] => {
                self.state = State::Size;
                Ok(Some(2))
            }
            _ => Err(Malformed::bad("a chunk is longer than its size")),
        }
    }

    fn read_trailers(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        if bytes.starts_with(b"\r\n") {
            self.state = State::End;
            return Ok(Some(2));
        }
        let Some(end) = memchr::memmem::find(bytes, b"\r\n\r\n") else {
            let lone = bytes.split_last().is_some_and(|(_, sure)| has_bare_end(sure));
            return match bytes.len() {
                ..=MOST_TRAILERS if !lone => Ok(None),
                _ => Err(Malformed::bad("trailers that do not end")),
            };
        };
        self.trailers.read(&bytes[..end + 2])?;
        if end > MOST_TRAILERS || self.trailers.len() > MOST_FIELDS {
            return Err(Malformed::bad("trailers are too long"));
        }
        self.state = State::End;
        Ok(Some(end + 4))
    }
}

/// A CR or LF without the other.
fn has_bare_end(bytes: &[u8]) -> bool {
    let mut before = 0;
    bytes.iter().any(|&byte| {
        let bare = (byte == b'\n') != (before == b'\r');
        before = byte;
        bare
    })
}

fn read_chunk_size(line: &[u8]) -> Result<u64, Malformed> {
    let bad = Malformed::bad("the size of a chunk is no number");
    let digits = line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len());
    let (size, extensions) = line.split_at(digits);
    let plain = extensions.is_empty() || extensions.starts_with(b";");
    if !(1..=16).contains(&digits) || !plain || !extensions.iter().all(|byte| is_value(*byte)) {
        return Err(bad);
    }
    u64::from_str_radix(super::syntax::ascii(size), 16).map_err(|_| bad)
}
