//! Lines, names and values: what HTTP/1 heads and trailers are made of.
//!
//! This reader is our own because the usual ones are kind: they take a bare LF for the end of a
//! line, fold lines, and leave open which of two lengths counts. What is taken two ways is how
//! requests are smuggled, so whatever is not plainly one thing is refused here.

use std::ops::Range;

use palisade_policy::l7::field;
pub use palisade_policy::l7::{field::trim, target::Malformed};

/// Most fields in a head, or in trailers.
pub const MOST_FIELDS: usize = 100;
/// Fields of most heads, and what they take.
const USUAL_FIELDS: usize = 16;
const USUAL_LENGTH: usize = 512;
/// Longest head.
pub const MOST_HEAD: usize = 64 << 10;
/// Longest first line.
pub const MOST_LINE: usize = 32 << 10;
/// Longest method.
pub const MOST_METHOD: usize = 32;

const TOKEN: u8 = 1;
const VALUE: u8 = 2;

static CLASSES: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = u8::MIN;
    loop {
        let visible = byte > 0x20 && byte != 0x7f;
        if visible || byte == 0x20 || byte == 0x09 {
            table[byte as usize] |= VALUE;
        }
        if field::is_token(byte) {
            table[byte as usize] |= TOKEN;
        }
        if byte == u8::MAX {
            return table;
        }
        byte += 1;
    }
}

/// Whether the byte may be in a method or the name of a field (RFC 9110 section 5.6.2).
#[must_use]
pub fn is_token(byte: u8) -> bool {
    CLASSES[usize::from(byte)] & TOKEN != 0
}

/// Whether the byte may be in the value of a field.
#[must_use]
pub fn is_value(byte: u8) -> bool {
    CLASSES[usize::from(byte)] & VALUE != 0
}

/// Finds the end of a head in bytes that arrive one by one or all at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scanner {
    scanned: usize,
    line: usize,
    lines: usize,
}

impl Scanner {
    /// The length of the head with the empty line that ends it, `None` while that is not there.
    /// The bytes are those of the call before and more.
    ///
    /// # Errors
    ///
    /// A line does not end in CR LF, or the head is too long.
    pub fn find(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        while let Some(at) = memchr::memchr(b'\n', &bytes[self.scanned..]) {
            let end = self.scanned + at;
            let line = &bytes[self.line..end];
            let Some((b'\r', line)) = line.split_last() else {
                return Err(Malformed::bad("a line ends without CR"));
            };
            self.check(end)?;
            self.scanned = end + 1;
            self.line = end + 1;
            if line.is_empty() {
                return Ok(Some(end + 1));
            }
            self.lines += 1;
        }
        self.scanned = bytes.len();
        self.check(bytes.len()).map(|()| None)
    }

    /// Whether a head of which this much was read may go on.
    fn check(&self, length: usize) -> Result<(), Malformed> {
        if self.lines == 0 && length > MOST_LINE {
            return Err(Malformed { status: 414, why: "the target is too long" });
        }
        if self.lines > 1 + MOST_FIELDS || length > MOST_HEAD {
            return Err(Malformed { status: 431, why: "too many or too long header fields" });
        }
        Ok(())
    }
}

/// Fields of a head or of trailers, in their order. Names are in lower case.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    text: Vec<u8>,
    spans: Vec<Span>,
}

#[derive(Clone, Debug)]
struct Span {
    name: Range<u32>,
    value: Range<u32>,
}

impl Fields {
    /// Reads lines, each of them ended by CR LF, in place of what was there.
    ///
    /// # Errors
    ///
    /// A line is no field.
    pub fn read(&mut self, lines: &[u8]) -> Result<(), Malformed> {
        self.text.clear();
        self.spans.clear();
        self.spans.reserve(USUAL_FIELDS);
        self.text.extend_from_slice(lines);
        let mut at = 0;
        while at < self.text.len() {
            at = self.read_line(at)?;
        }
        Ok(())
    }

    fn read_line(&mut self, start: usize) -> Result<usize, Malformed> {
        let rest = &mut self.text[start..];
        let name = rest.iter().position(|byte| !is_token(*byte)).unwrap_or(rest.len());
        match rest.get(name) {
            Some(b':') if name > 0 => {}
            _ => return Err(Malformed::bad("the name of a header field is no token and colon")),
        }
        rest[..name].make_ascii_lowercase();
        let value = name + 1;
        let length = rest[value..].iter().position(|byte| !is_value(*byte));
        let end = value + length.unwrap_or(rest.len() - value);
        if !rest[end..].starts_with(b"\r\n") {
            return Err(Malformed::bad("a control character in the value of a header field"));
        }
        let trimmed = trim(&rest[value..end]);
        let from = if trimmed.is_empty() { value } else { offset(rest, trimmed) };
        let to = from + trimmed.len();
        self.spans
            .push(Span { name: span(start, start + name), value: span(start + from, start + to) });
        Ok(start + end + 2)
    }

    /// Each field.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> + Clone {
        self.spans.iter().map(|span| (self.name(span), self.value(span)))
    }

    /// The values of one name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        let named = |span: &&Span| self.text[range(&span.name)] == *name.as_bytes();
        self.spans.iter().filter(named).map(|span| self.value(span))
    }

    /// Keeps the fields that satisfy a condition.
    pub fn retain(&mut self, keep: impl Fn(&str, &[u8]) -> bool) {
        let text = &self.text;
        self.spans.retain(|span| keep(ascii(&text[range(&span.name)]), &text[range(&span.value)]));
    }

    /// Adds a field, whose name is in lower case.
    pub fn push(&mut self, name: &str, value: &[u8]) {
        if self.spans.capacity() == 0 {
            self.spans.reserve(USUAL_FIELDS);
            self.text.reserve(USUAL_LENGTH);
        }
        let start = self.text.len();
        let middle = start + name.len();
        self.text.extend_from_slice(name.as_bytes());
        self.text.extend_from_slice(value);
        self.spans.push(Span { name: span(start, middle), value: span(middle, self.text.len()) });
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Writes each field as a line.
    pub fn write(&self, out: &mut Vec<u8>) {
        for span in &self.spans {
            write_field(out, &self.text[range(&span.name)], self.value(span));
        }
    }

    fn name(&self, span: &Span) -> &str {
        ascii(&self.text[range(&span.name)])
    }

    fn value(&self, span: &Span) -> &[u8] {
        &self.text[range(&span.value)]
    }
}

/// Writes one field as a line.
pub fn write_field(out: &mut Vec<u8>, name: impl AsRef<[u8]>, value: &[u8]) {
    out.extend_from_slice(name.as_ref());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Writes a number in decimal digits.
pub(super) fn write_number(out: &mut Vec<u8>, number: u64) {
    let start = out.len();
    let mut rest = number;
    loop {
        out.push(b'0' + (rest % 10) as u8);
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out[start..].reverse();
}

/// A token as text. Tokens are ASCII.
pub(super) fn ascii(token: &[u8]) -> &str {
    std::str::from_utf8(token).unwrap_or_default()
}

/// A head is far shorter than four gigabytes ([`MOST_HEAD`]).
#[expect(clippy::cast_possible_truncation, reason = "offsets in a head are small")]
const fn span(start: usize, end: usize) -> Range<u32> {
    start as u32..end as u32
}

const fn range(span: &Range<u32>) -> Range<usize> {
    span.start as usize..span.end as usize
}

/// Where a part of a slice begins in it.
fn offset(whole: &[u8], part: &[u8]) -> usize {
    part.as_ptr().addr() - whole.as_ptr().addr()
}
