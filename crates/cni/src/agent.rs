//! The conversation with the agent, and what to do without it.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use palisade_api::cni::{
    Attachment, Code, Failure, MAX_QUEUED_DELETIONS, Operation, Request, Response, deletion_queue,
    read, write,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Why there is no answer.
pub(crate) enum Error {
    /// The agent said no.
    Refused(Failure),
    /// The agent did not say anything.
    Away(io::Error),
}

pub(crate) fn ask(
    socket: &Path,
    operation: Operation,
    patience: Duration,
) -> Result<Response, Error> {
    match converse(socket, operation, patience) {
        Ok(Response::Failed(failure)) => Err(Error::Refused(failure)),
        Ok(response) => Ok(response),
        Err(error) => Err(Error::Away(error)),
    }
}

fn converse(socket: &Path, operation: Operation, patience: Duration) -> io::Result<Response> {
    let deadline = Instant::now() + patience;
    let mut stream = dial(socket, deadline)?;
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))?;
    let patience_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    write(&mut stream, &Request { patience_ms, operation })?;
    read(&mut stream)
}

/// Connects without blocking for good when the agent's queue is full.
fn dial(socket: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let address = SocketAddrUnix::new(socket)?;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&fd, &address) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            // The kernel offers no event for room in another process's queue.
            Err(Errno::AGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

pub(crate) fn queue_deletion(socket: &Path, attachment: &Attachment) -> Result<(), Failure> {
    let queue = deletion_queue(socket);
    let failed = |error: io::Error| Failure {
        code: Code::TryAgain,
        message: format!("the agent is away and {attachment} cannot be queued for deletion"),
        details: format!("{}: {error}", queue.display()),
    };
    fs::create_dir_all(&queue).map_err(failed)?;
    let waiting = fs::read_dir(&queue).map_err(failed)?.count();
    if waiting >= MAX_QUEUED_DELETIONS {
        return Err(failed(io::Error::other(format!("{waiting} deletions are waiting already"))));
    }
    fs::write(queue.join(attachment.file_name()), "").map_err(failed)
}
