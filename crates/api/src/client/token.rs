//! Tokens that are renewed in a file, as the kubelet does it for pods.

use std::{
    fs,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, ensure};
use http::{HeaderValue, Request, header::AUTHORIZATION};

/// A file with a token.
///
/// It is read for each request. There are few of them, the file is in memory, and so nobody goes on
/// for a while with a token that the server does not accept any more.
#[derive(Debug)]
pub(super) struct TokenFile {
    path: String,
    /// What was read last: it may serve for long where the file is away for a moment.
    last: Mutex<HeaderValue>,
}

impl TokenFile {
    /// # Errors
    /// There is no token in the file.
    pub(super) fn open(path: String) -> anyhow::Result<Self> {
        let last = read(&path).with_context(|| format!("there is no token in {path}"))?;
        Ok(Self { path, last: Mutex::new(last) })
    }

    /// The request with the token of this moment.
    pub(super) fn authorize<B>(&self, mut request: Request<B>) -> Request<B> {
        request.headers_mut().insert(AUTHORIZATION, self.header());
        request
    }

    fn header(&self) -> HeaderValue {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(token) = read(&self.path) {
            *last = token;
        }
        last.clone()
    }
}

fn read(path: &str) -> anyhow::Result<HeaderValue> {
    let text = fs::read_to_string(path)?;
    let token = text.trim();
    ensure!(!token.is_empty(), "it is empty");
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_token_is_taken_at_once_and_the_last_one_stands_where_there_is_none() {
        let path = std::env::temp_dir().join(format!("palisade-token-{}", std::process::id()));
        let write = |text: &str| fs::write(&path, text).unwrap();
        let open = || TokenFile::open(path.display().to_string());
        let text = format!("{:#}", open().unwrap_err());
        assert!(text.contains(&path.display().to_string()), "{text}");
        write("one\n");
        let file = open().unwrap();
        let sent = || file.authorize(Request::new(())).headers()[AUTHORIZATION].clone();
        assert_eq!(sent(), "Bearer one");
        assert!(sent().is_sensitive());
        write("two");
        assert_eq!(sent(), "Bearer two");
        for nonsense in ["", " \n", "three\nfour"] {
            write(nonsense);
            assert_eq!(sent(), "Bearer two", "{nonsense:?}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(sent(), "Bearer two");
    }
}
