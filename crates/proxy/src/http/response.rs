//! Answers over HTTP/1.

use super::{
    body::Framing,
    request::{Hops, Request, is_chunked, is_hop, only, read_length, split_line},
    syntax::{Fields, Malformed, ascii, is_value, write_field, write_number},
};

/// An answer as it is forwarded.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status.
    pub status: u16,
    reason: Vec<u8>,
    /// End-to-end fields, without those that frame the body.
    pub fields: Fields,
    /// How the server tells the end of the body.
    pub body: Framing,
    /// Length of the body that is not sent (`HEAD`, 304).
    told: Option<u64>,
    /// The server ends the connection with this answer.
    pub close: bool,
}

impl Response {
    /// Reads the head of an answer to a request.
    ///
    /// # Errors
    ///
    /// It is not certain what the answer is.
    pub fn read(head: &[u8], request: &Request) -> Result<Self, Malformed> {
        let (line, rest) = split_line(head)?;
        let (status, reason, old) = read_line(line)?;
        let mut fields = Fields::default();
        fields.read(rest.strip_suffix(b"\r\n").unwrap_or(rest))?;

        let length = only(fields.all("content-length"))?.map(read_length).transpose()?;
        let coding = only(fields.all("transfer-encoding"))?.map(is_chunked).transpose()?;
        if coding.is_some() && (length.is_some() || old) {
            return Err(Malformed::bad("two ways to tell where the body ends"));
        }
        let bodiless = request.method == "HEAD" || matches!(status, 100..200 | 204 | 304);
        let body = match (length, coding) {
            _ if bodiless => Framing::None,
            (_, Some(chunked)) => chunked,
            (Some(length), _) => Framing::Length(length),
            _ => Framing::UntilClose,
        };
        let hops = Hops::read(fields.all("connection"))?;
        if status == 101 {
            switches(request, &fields, &hops)?;
        }
        let close = old || hops.names("close") || body == Framing::UntilClose;
        let told = length.filter(|_| bodiless && !matches!(status, 100..200 | 204));
        fields.retain(|name, _| !(hops.names(name) || is_hop(name) || name == "content-length"));
        Ok(Self { status, reason: reason.to_vec(), fields, body, told, close })
    }

    /// Only an interim answer.
    #[must_use]
    pub fn is_interim(&self) -> bool {
        (100..200).contains(&self.status) && self.status != 101
    }

    /// Writes the head for the client; `close` tells it that the connection ends.
    pub fn write(&self, out: &mut Vec<u8>, body: Framing, close: bool) {
        out.extend_from_slice(b"HTTP/1.1 ");
        write_number(out, self.status.into());
        out.push(b' ');
        out.extend_from_slice(&self.reason);
        out.extend_from_slice(b"\r\n");
        self.fields.write(out);
        body.write(out);
        if let Some(length) = self.told {
            Framing::Length(length).write(out);
        }
        if self.status == 101 {
            write_field(out, "connection", b"upgrade");
            write_field(out, "upgrade", b"websocket");
        } else if close {
            write_field(out, "connection", b"close");
        }
        out.extend_from_slice(b"\r\n");
    }
}

fn read_line(line: &[u8]) -> Result<(u16, &[u8], bool), Malformed> {
    let bad = Malformed::bad("the first line is no status");
    let (version, rest) = line.split_at_checked(9).ok_or(bad)?;
    let old = match version {
        b"HTTP/1.1 " => false,
        b"HTTP/1.0 " => true,
        _ => return Err(bad),
    };
    let (digits, rest) = rest.split_at_checked(3).ok_or(bad)?;
    let reason = match rest {
        [] => rest,
        [b' ', reason @ ..] => reason,
        _ => return Err(bad),
    };
    if !digits.iter().all(u8::is_ascii_digit) || !reason.iter().all(|byte| is_value(*byte)) {
        return Err(bad);
    }
    let status: u16 = ascii(digits).parse().map_err(|_| bad)?;
    if status < 100 {
        return Err(bad);
    }
    Ok((status, reason, old))
}

/// The protocol may change only to the one that was asked for.
fn switches(request: &Request, fields: &Fields, hops: &Hops) -> Result<(), Malformed> {
    let websocket =
        only(fields.all("upgrade"))?.is_some_and(|to| to.eq_ignore_ascii_case(b"websocket"));
    if request.websocket && websocket && hops.names("upgrade") {
        return Ok(());
    }
    Err(Malformed::bad("the server changes to a protocol that nobody asked for"))
}
