//! Network namespaces by path.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The file system of `/proc/<pid>/ns` entries and of bind mounts of them.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Why a path is not a usable network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The pod is gone.
    #[error("network namespace {} does not exist", .0.display())]
    NotFound(PathBuf),
    /// A regular file, a directory, or a namespace of another kind.
    #[error("{} is not a network namespace", .0.display())]
    WrongKind(PathBuf),
    /// Anything else.
    #[error("cannot open network namespace {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open network namespace. It lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    path: PathBuf,
}

/// Tells namespaces apart: two paths with the same identity are the same namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetNsId {
    device: u64,
    inode: u64,
}

impl NetNs {
    /// Opens the namespace at `path`.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, NamespaceError> {
        let path = path.into();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => return Err(NamespaceError::NotFound(path)),
            Err(source) => return Err(NamespaceError::Open { path, source }),
        };
        match rustix::fs::fstatfs(&file) {
            Ok(fs)
                if u64::try_from(fs.f_type).is_ok_and(|magic| magic == NSFS_MAGIC)
                    && is_network(&file) => {}
            Ok(_) => return Err(NamespaceError::WrongKind(path)),
            Err(errno) => return Err(NamespaceError::Open { path, source: errno.into() }),
        }
        Ok(Self { file, path })
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NamespaceError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its identity.
    pub fn id(&self) -> io::Result<NetNsId> {
        let stat = rustix::fs::fstat(&self.file)?;
        Ok(NetNsId { device: stat.st_dev, inode: stat.st_ino })
    }

    /// Moves the calling thread into the namespace for good.
    pub fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it. Sockets made
    /// there stay in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                self.enter()?;
                Ok(work())
            })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Mount, PID and other namespaces lie in the same file system.
#[expect(unsafe_code, reason = "no crate wraps this question; it has no argument")]
fn is_network(file: &File) -> bool {
    // SAFETY: the descriptor is open, and the kernel reads and writes no memory of ours.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}

fn is_gone(error: &io::Error) -> bool {
    // `/proc/<pid>/ns/net` of a process that is exiting says ESRCH.
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}
