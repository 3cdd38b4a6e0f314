//! Answers in the server's place, in the words that users of other proxies know.

use std::time::SystemTime;

use super::syntax::{Malformed, write_field};

/// Body of the answer to what policy denies.
pub const DENIED: &str = "Access denied\r\n";

/// An answer of the proxy's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Status.
    pub status: u16,
    /// Body.
    pub body: &'static str,
}

impl Reply {
    /// Policy does not allow the request.
    pub const DENIED: Self = Self { status: 403, body: DENIED };
    /// The server cannot be reached, or goes away before it answers.
    pub const NO_SERVER: Self = Self {
        status: 503,
        body: "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
    };
    /// What the server says is no answer.
    pub const NO_ANSWER: Self = Self {
        status: 502,
        body: "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
    };
    /// The server does not answer in time.
    pub const LATE: Self = Self { status: 504, body: "upstream request timeout" };

    /// The request is none.
    #[must_use]
    pub fn malformed(fault: Malformed) -> Self {
        Self { status: fault.status, body: reason(fault.status) }
    }

    /// Writes it as HTTP/1; `close` tells that the connection ends.
    pub fn write(self, out: &mut Vec<u8>, head_only: bool, close: bool) {
        out.extend_from_slice(
            format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status)).as_bytes(),
        );
        write_field(out, "content-length", self.body.len().to_string().as_bytes());
        write_field(out, "content-type", b"text/plain");
        write_field(out, "date", date().as_bytes());
        write_field(out, "server", SERVER.as_bytes());
        if close {
            write_field(out, "connection", b"close");
        }
        out.extend_from_slice(b"\r\n");
        if !head_only {
            out.extend_from_slice(self.body.as_bytes());
        }
    }
}

/// Name of the server in the proxy's own answers: what users of `cilium.io` policies see.
pub const SERVER: &str = "envoy";

/// Now, as HTTP has it.
#[must_use]
pub fn date() -> String {
    httpdate::fmt_http_date(SystemTime::now())
}

const fn reason(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        414 => "URI Too Long",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}
