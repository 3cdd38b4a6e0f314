//! Container output: written to files in the format of container runtimes, read back for `logs`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::fs::{self, File};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufReader};
use tokio::sync::{Mutex, watch};

use crate::runtime::LogRequest;

/// A file that has grown so long becomes the old one; the old one before it goes.
const MAX_FILE: u64 = 10 << 20;
/// Lines longer than this are cut into several.
const MAX_LINE: usize = 16 << 10;

/// The log of one run of a container.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    writer: Mutex<Writer>,
    /// Changes with every write; its sender goes when the container has ended.
    progress: watch::Receiver<u64>,
    ended: Mutex<Option<watch::Sender<u64>>>,
}

#[derive(Debug)]
struct Writer {
    file: File,
    length: u64,
}

impl Log {
    pub(super) async fn create(path: PathBuf) -> std::io::Result<Arc<Self>> {
        let writer = Writer { file: File::create(&path).await?, length: 0 };
        let (sender, progress) = watch::channel(0);
        let ended = Mutex::new(Some(sender));
        Ok(Arc::new(Self { path, writer: Mutex::new(writer), progress, ended }))
    }

    /// Copies a stream of the container until it ends.
    pub(super) async fn copy(self: Arc<Self>, name: &'static str, stream: impl AsyncRead + Unpin) {
        let mut reader = BufReader::with_capacity(MAX_LINE, stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let limit = MAX_LINE as u64;
            match (&mut reader).take(limit).read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let complete = line.last() == Some(&b'\n');
            if complete {
                line.pop();
            }
            // A full disk must not stop the container; what cannot be kept is lost.
            let _ = self.write(name, &line, complete).await;
        }
    }

    async fn write(&self, stream: &str, line: &[u8], complete: bool) -> std::io::Result<()> {
        let tag = if complete { 'F' } else { 'P' };
        let time = format!("{:.9}", jiff::Timestamp::now());
        let mut entry = format!("{time} {stream} {tag} ").into_bytes();
        entry.extend_from_slice(line);
        entry.push(b'\n');
        let mut writer = self.writer.lock().await;
        if writer.length > MAX_FILE {
            fs::rename(&self.path, older(&self.path)).await?;
            *writer = Writer { file: File::create(&self.path).await?, length: 0 };
        }
        writer.file.write_all(&entry).await?;
        writer.file.flush().await?;
        writer.length += entry.len() as u64;
        if let Some(progress) = &*self.ended.lock().await {
            progress.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// The container has ended and everything it wrote is here.
    pub(super) async fn end(&self) {
        self.ended.lock().await.take();
    }

    /// The end of what was written, for the termination message.
    pub(super) async fn read(
        self: &Arc<Self>,
        request: &LogRequest,
    ) -> std::io::Result<BoxStream<'static, Bytes>> {
        let mut lines = VecDeque::new();
        let mut position = 0;
        let mut progress = self.progress.clone();
        progress.mark_unchanged();
        for path in [older(&self.path), self.path.clone()] {
            let Ok(content) = fs::read(&path).await else { continue };
            position = content.len() as u64;
            for entry in content.split_inclusive(|byte| *byte == b'\n') {
                lines.extend(format_entry(entry, request));
                if request.tail_lines.is_some_and(|tail| lines.len() as u64 > tail) {
                    lines.pop_front();
                }
            }
        }
        let past = futures::stream::iter(lines);
        if !request.follow {
            return Ok(past.boxed());
        }
        Ok(past.chain(follow(self.path.clone(), position, progress, request.clone())).boxed())
    }
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

fn follow(
    path: PathBuf,
    position: u64,
    progress: watch::Receiver<u64>,
    request: LogRequest,
) -> impl futures::Stream<Item = Bytes> + Send {
    let state = (path, position, progress, request, false);
    futures::stream::unfold(state, |(path, position, mut progress, request, done)| async move {
        if done {
            return None;
        }
        let ended = progress.changed().await.is_err();
        let (bytes, position) = read_from(&path, position).await.unwrap_or((Vec::new(), position));
        let mut out = Vec::new();
        for entry in bytes.split_inclusive(|byte| *byte == b'\n') {
            if let Some(line) = format_entry(entry, &request) {
                out.extend_from_slice(&line);
            }
        }
        Some((Bytes::from(out), (path, position, progress, request, ended)))
    })
    .filter(|bytes| std::future::ready(!bytes.is_empty()))
}

/// Whole entries behind `position`, and the position behind them.
async fn read_from(path: &Path, position: u64) -> std::io::Result<(Vec<u8>, u64)> {
    let mut file = File::open(path).await?;
    // A shorter file is a new one.
    let start = if file.metadata().await?.len() < position { 0 } else { position };
    file.seek(std::io::SeekFrom::Start(start)).await?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).await?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    bytes.truncate(whole);
    Ok((bytes, start + whole as u64))
}

fn format_entry(entry: &[u8], request: &LogRequest) -> Option<Bytes> {
    let mut parts = entry.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let (_stream, tag, mut line) = (parts.next()?, parts.next()?, parts.next()?);
    if let Some(since) = request.since
        && time.parse::<jiff::Timestamp>().is_ok_and(|time| time < since)
    {
        return None;
    }
    if tag == b"P" {
        line = line.strip_suffix(b"\n").unwrap_or(line);
    }
    if request.timestamps {
        return Some([time.as_bytes(), b" ", line].concat().into());
    }
    Some(Bytes::copy_from_slice(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn text(log: &Arc<Log>, request: LogRequest) -> String {
        let chunks: Vec<Bytes> = log.read(&request).await.unwrap().collect().await;
        String::from_utf8(chunks.concat()).unwrap()
    }

    #[tokio::test]
    async fn keeps_and_follows() {
        let directory = std::env::temp_dir().join(format!("palisade-log-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let log = Log::create(directory.join("0.log")).await.unwrap();
        Arc::clone(&log).copy("stdout", &b"one\ntwo\nthree\n"[..]).await;
        assert_eq!(text(&log, LogRequest::default()).await, "one\ntwo\nthree\n");
        let tail = LogRequest { tail_lines: Some(1), ..LogRequest::default() };
        assert_eq!(text(&log, tail).await, "three\n");
        let follow = LogRequest { follow: true, ..LogRequest::default() };
        let reader = tokio::spawn({
            let log = Arc::clone(&log);
            async move { text(&log, follow).await }
        });
        tokio::task::yield_now().await;
        Arc::clone(&log).copy("stderr", &b"four\n"[..]).await;
        log.end().await;
        assert_eq!(reader.await.unwrap(), "one\ntwo\nthree\nfour\n");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
