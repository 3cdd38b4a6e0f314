//! The part of SPDY/3.1 that port forwarding speaks: the client opens streams, both sides send
//! data over them. Nobody counts windows, as no client of `kubectl port-forward` does.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

/// Clients send what one read of a socket gave.
const MAX_DATA: usize = 1 << 20;
/// All control frames together with their headers are far smaller.
const MAX_CONTROL: usize = 16 << 10;
const MAX_HEADERS: usize = 4 << 10;

const CONTROL: u32 = 0x8000_0000;
const VERSION: u32 = 3;
const SYN_STREAM: u32 = 1;
const SYN_REPLY: u32 = 2;
const RST_STREAM: u32 = 3;
const PING: u32 = 6;
const FIN: u8 = 1;
/// Reason of a reset.
const PROTOCOL_ERROR: u32 = 1;

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// It opens a stream.
    Open { stream: u32, headers: Headers },
    /// Data of a stream; `last` ends what the client has to say there.
    Data { stream: u32, bytes: Bytes, last: bool },
    /// It gives up a stream.
    Reset { stream: u32 },
    /// It wants the same back.
    Ping { id: u32 },
    /// Something that needs no answer.
    Other,
}

/// The client does not keep to the protocol: the session cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("malformed SPDY frame: {0}")]
pub(super) struct Malformed(&'static str);

/// Names in lower case, and values.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of a header.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn parse(mut block: &[u8]) -> Option<Self> {
        let count = block.try_get_u32().ok()?;
        let mut text = || {
            let length = usize::try_from(block.try_get_u32().ok()?).ok()?;
            let (text, rest) = block.split_at_checked(length)?;
            block = rest;
            String::from_utf8(text.to_vec()).ok()
        };
        (0..count).map(|_| Some((text()?, text()?))).collect::<Option<_>>().map(Self)
    }
}

/// Finds frames in a stream of bytes.
pub(super) struct Reader {
    buffer: BytesMut,
    /// One stream of compressed bytes runs through the headers of all frames.
    inflate: Decompress,
}

impl Default for Reader {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), inflate: Decompress::new(true) }
    }
}

impl Reader {
    /// What arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, if all of it has arrived.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, Malformed> {
        let Some((head, _)) = self.buffer.split_first_chunk::<8>() else { return Ok(None) };
        let [first, second] = [&head[..4], &head[4..]].map(|mut word| word.get_u32());
        let [flags, ..] = second.to_be_bytes();
        let length = usize::try_from(second & 0x00ff_ffff).unwrap_or(usize::MAX);
        if length > if first & CONTROL == 0 { MAX_DATA } else { MAX_CONTROL } {
            return Err(Malformed("it is too long"));
        }
        if self.buffer.len() < 8 + length {
            return Ok(None);
        }
        self.buffer.advance(8);
        let body = self.buffer.split_to(length).freeze();
        if first & CONTROL == 0 {
            return Ok(Some(Frame::Data { stream: first, bytes: body, last: flags & FIN != 0 }));
        }
        if (first & !CONTROL) >> 16 != VERSION {
            return Err(Malformed("it is of another version"));
        }
        self.control(first & 0xffff, body).map(Some)
    }

    fn control(&mut self, kind: u32, mut body: Bytes) -> Result<Frame, Malformed> {
        let mut number = || body.try_get_u32().map_err(|_| Malformed("it is too short"));
        match kind {
            SYN_STREAM => {
                let stream = number()?;
                // A parent, a priority and a slot, which mean nothing here.
                let block = body.get(6..).ok_or(Malformed("it is too short"))?;
                Ok(Frame::Open { stream, headers: self.headers(block)? })
            }
            RST_STREAM => Ok(Frame::Reset { stream: number()? }),
            PING => Ok(Frame::Ping { id: number()? }),
            _ => Ok(Frame::Other),
        }
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, Malformed> {
        const WRONG: Malformed = Malformed("its headers cannot be read");
        let mut plain = Vec::with_capacity(MAX_HEADERS);
        let start = self.inflate.total_in();
        let mut rest = block;
        while !rest.is_empty() {
            let before = (self.inflate.total_in(), plain.len());
            let step = self.inflate.decompress_vec(rest, &mut plain, FlushDecompress::Sync);
            match step {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(&dictionary()).map_err(|_| WRONG)?;
                }
                Err(_) => return Err(WRONG),
                Ok(_) if before == (self.inflate.total_in(), plain.len()) => return Err(WRONG),
                Ok(_) => {}
            }
            let read = usize::try_from(self.inflate.total_in() - start).map_err(|_| WRONG)?;
            rest = block.get(read..).ok_or(WRONG)?;
        }
        Headers::parse(&plain).ok_or(WRONG)
    }
}

/// Makes frames.
pub(super) struct Writer {
    deflate: Compress,
}

impl Default for Writer {
    fn default() -> Self {
        Self { deflate: Compress::new(Compression::none(), true) }
    }
}

impl Writer {
    /// Accepts a stream, without headers.
    pub(super) fn accept(&mut self, stream: u32) -> Bytes {
        let mut block = Vec::with_capacity(64);
        // There is room: four bytes and what marks a block.
        let none = 0_u32.to_be_bytes();
        let _ = self.deflate.compress_vec(&none, &mut block, FlushCompress::Sync);
        let mut body = stream.to_be_bytes().to_vec();
        body.append(&mut block);
        control(SYN_REPLY, &body)
    }
}

/// Refuses a stream.
pub(super) fn refuse(stream: u32) -> Bytes {
    let words = [stream, PROTOCOL_ERROR].map(u32::to_be_bytes);
    control(RST_STREAM, words.as_flattened())
}

/// Answers a ping.
pub(super) fn pong(id: u32) -> Bytes {
    control(PING, &id.to_be_bytes())
}

/// Data of a stream.
pub(super) fn data(stream: u32, bytes: &[u8], last: bool) -> Bytes {
    frame(stream, if last { FIN } else { 0 }, bytes)
}

fn control(kind: u32, body: &[u8]) -> Bytes {
    frame(CONTROL | VERSION << 16 | kind, 0, body)
}

fn frame(first: u32, flags: u8, body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(8 + body.len());
    bytes.put_u32(first);
    bytes.put_u8(flags);
    bytes.put_uint(body.len() as u64, 3);
    bytes.put_slice(body);
    bytes.freeze()
}

/// What both sides expect to find in headers: words with their lengths, then text.
fn dictionary() -> Vec<u8> {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split(',') {
        dictionary.put_u32(word.len() as u32);
        dictionary.put_slice(word.as_bytes());
    }
    dictionary.put_slice(TEXT.as_bytes());
    dictionary
}

const WORDS: &str = "options,head,post,put,delete,trace,accept,accept-charset,accept-encoding,\
accept-language,accept-ranges,age,allow,authorization,cache-control,connection,content-base,\
content-encoding,content-language,content-length,content-location,content-md5,content-range,\
content-type,date,etag,expect,expires,from,host,if-match,if-modified-since,if-none-match,if-range,\
if-unmodified-since,last-modified,location,max-forwards,pragma,proxy-authenticate,\
proxy-authorization,range,referer,retry-after,server,te,trailer,transfer-encoding,upgrade,\
user-agent,vary,via,warning,www-authenticate,method,get,status,200 OK,version,HTTP/1.1,url,public,\
set-cookie,keep-alive,origin";
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416\
417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request\
401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented\
503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, \
Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,\
application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdch\
charset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

#[cfg(test)]
mod tests {
    use super::*;

    /// As a client compresses it.
    fn open(deflate: &mut Compress, stream: u32, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut block = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.put_u32(text.len() as u32);
            block.put_slice(text.as_bytes());
        }
        let mut packed = Vec::with_capacity(1024);
        deflate.compress_vec(&block, &mut packed, FlushCompress::Sync).unwrap();
        let mut body = stream.to_be_bytes().to_vec();
        body.extend_from_slice(&[0; 6]);
        body.append(&mut packed);
        control(SYN_STREAM, &body).to_vec()
    }

    fn client() -> Compress {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(&dictionary()).unwrap();
        deflate
    }

    #[test]
    fn frames_are_found_however_they_arrive() {
        let mut deflate = client();
        let headers = [("streamtype", "error"), ("port", "80"), ("requestid", "0")];
        let mut bytes = open(&mut deflate, 1, &headers);
        bytes.extend(open(&mut deflate, 3, &[("streamtype", "data")]));
        bytes.extend(data(3, b"hello", false));
        bytes.extend(data(1, b"", true));
        bytes.extend(pong(7));
        bytes.extend(refuse(3));
        for size in [1, 7, bytes.len()] {
            let mut reader = Reader::default();
            let mut frames = Vec::new();
            for chunk in bytes.chunks(size) {
                reader.push(chunk);
                while let Some(frame) = reader.next().unwrap() {
                    frames.push(frame);
                }
            }
            let Frame::Open { stream: 1, headers } = &frames[0] else { panic!("{frames:?}") };
            assert_eq!(headers.get("port"), Some("80"));
            let Frame::Open { stream: 3, headers } = &frames[1] else { panic!("{frames:?}") };
            assert_eq!((headers.get("streamtype"), headers.get("port")), (Some("data"), None));
            let rest = [
                Frame::Data { stream: 3, bytes: "hello".into(), last: false },
                Frame::Data { stream: 1, bytes: Bytes::new(), last: true },
                Frame::Ping { id: 7 },
                Frame::Reset { stream: 3 },
            ];
            assert_eq!(frames[2..], rest);
        }
    }

    #[test]
    fn what_makes_no_sense_ends_the_session() {
        let mut bomb = client();
        let long = "x".repeat(MAX_HEADERS);
        let bomb = open(&mut bomb, 1, &[("streamtype", &long)]);
        let lies = {
            let mut deflate = client();
            let mut packed = Vec::with_capacity(64);
            let block = [0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff];
            deflate.compress_vec(&block, &mut packed, FlushCompress::Sync).unwrap();
            control(SYN_STREAM, &[&[0; 10], packed.as_slice()].concat())
        };
        let wrong: [&[u8]; 7] = [
            &bomb,
            &lies,
            &control(SYN_STREAM, &[0; 3]),
            &control(SYN_STREAM, &[9; 40]),
            &control(RST_STREAM, &[]),
            &[0x80, 2, 0, 6, 0, 0, 0, 0],
            &[0, 0, 0, 1, 0, 0xff, 0xff, 0xff],
        ];
        for bytes in wrong {
            let mut reader = Reader::default();
            reader.push(bytes);
            assert!(reader.next().is_err(), "{bytes:?}");
        }
    }
}
