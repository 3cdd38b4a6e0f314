//! The frames of a client (RFC 9113), read as their bytes pass on the way to the crate.
//!
//! The crate ends a connection at nearly every fault that ends it here, but under the name of
//! another one, and it drops what it should refuse. So this knows what frames are about and no
//! more: their sizes, which streams the client has ended, what its fields are like. Nothing of it
//! is judged or forwarded, and what the crate calls by the right name is left to the crate.

use std::collections::VecDeque;

use h2::Reason;

use super::{
    PREFACE,
    hpack::{self, Broken, Seen},
};

// Kinds (section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

// Flags.
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;

/// What a receiver allows that says nothing of it (section 6.5.2).
const MOST_FRAME: usize = 1 << 14;
const MOST_WINDOW: u32 = (1 << 31) - 1;
const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];
const SETTING: usize = 6;
/// Streams of which it is known how the client ended them: all that it may have at a time, and some
/// that are over.
const MOST_STREAMS: usize = 128;

/// Reads the frames of one connection, beginning with the preface.
#[derive(Debug)]
pub struct Reader {
    within: Within,
    piece: Piece,
    /// Of the payload.
    left: usize,
    block: Option<Block>,
    fields: hpack::Reader,
    streams: Streams,
    malformed: Vec<u32>,
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The code of the error.
    pub reason: Reason,
    /// How many of the bytes come before the frame that has it.
    pub before: usize,
}

/// Where the next byte is.
#[derive(Clone, Copy, Debug)]
enum Within {
    /// In the header of a frame.
    Header,
    /// In a payload of which nothing has to be known.
    Other,
    Settings,
    /// In what HEADERS have before the fields.
    Prefix {
        flags: u8,
    },
    /// In fields, and in the padding after them.
    Fields {
        padding: usize,
        last: bool,
    },
}

/// A block of fields, which goes on until a frame ends it (section 4.3).
#[derive(Clone, Copy, Debug)]
struct Block {
    stream: u32,
    section: Section,
}

/// What a block is to its stream.
#[derive(Clone, Copy, Debug)]
enum Section {
    Head,
    Trailers,
}

impl Block {
    /// Whether there is in it what must not be there. The crate drops a fragment in the path, a
    /// pseudo-header in trailers (section 8.1), and whatever it is that comes in a part which ends
    /// within a field.
    fn is_malformed(self, seen: Seen) -> bool {
        match self.section {
            Section::Head => seen.malformed,
            Section::Trailers => seen.malformed || seen.has_pseudo(),
        }
    }
}

impl From<Broken> for Reason {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Coding => Self::COMPRESSION_ERROR,
            Broken::NoName => Self::PROTOCOL_ERROR,
        }
    }
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            within: Within::Other,
            piece: Piece::of(0),
            left: PREFACE.len(),
            block: None,
            fields: hpack::Reader::default(),
            streams: Streams::default(),
            malformed: Vec::new(),
        }
    }
}

impl Reader {
    /// Reads what comes next. After a fault nothing is read any more.
    ///
    /// # Errors
    ///
    /// The connection is to end, in the state that it is in before the frame with the fault.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let (mut rest, mut before) = (bytes, 0);
        while !rest.is_empty() {
            self.step(&mut rest).map_err(|reason| Fault { reason, before })?;
            if let Within::Header = self.within {
                before = bytes.len() - rest.len();
            }
        }
        Ok(())
    }

    /// How long the fields are, names and values, of a block that has not ended.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.fields.length()
    }

    /// Streams that are malformed (section 8.1.1), those among them that the crate refuses itself.
    pub fn take_malformed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.malformed)
    }

    /// As much of a frame as there is.
    fn step(&mut self, rest: &mut &[u8]) -> Result<(), Reason> {
        if let Within::Header = self.within {
            if !self.piece.fill(rest) {
                return Ok(());
            }
            self.begin(Header::read(self.piece.bytes))?;
        }
        let payload = take(rest, self.left);
        self.left -= payload.len();
        self.payload(payload)?;
        match self.left {
            0 => self.end(),
            _ => Ok(()),
        }
    }

    fn begin(&mut self, header: Header) -> Result<(), Reason> {
        if !header.fits() {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        // Nothing comes between the parts of a block, and no part without a beginning.
        let continues = (header.kind == CONTINUATION).then_some(header.stream);
        if continues != self.block.map(|block| block.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        match header.kind {
            DATA => self.streams.data(header)?,
            HEADERS => {
                let section = self.streams.headers(header)?;
                self.block = Some(Block { stream: header.stream, section });
            }
            RST_STREAM => self.streams.reset(header.stream),
            PUSH_PROMISE => return Err(Reason::PROTOCOL_ERROR),
            _ => {}
        }
        self.left = header.length;
        (self.within, self.piece) = match header.kind {
            SETTINGS => (Within::Settings, Piece::of(SETTING)),
            HEADERS => (Within::Prefix { flags: header.flags }, Piece::of(header.prefix())),
            CONTINUATION => {
                let last = header.has(END_HEADERS);
                (Within::Fields { padding: 0, last }, Piece::of(0))
            }
            _ => (Within::Other, Piece::of(0)),
        };
        Ok(())
    }

    fn payload(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        match self.within {
            Within::Header | Within::Other => Ok(()),
            Within::Settings => self.settings(bytes),
            Within::Prefix { flags } => match self.piece.fill(&mut bytes) {
                true => {
                    let padding = self.padding(flags, self.left + bytes.len())?;
                    self.within = Within::Fields { padding, last: flags & END_HEADERS != 0 };
                    self.fields(bytes, padding)
                }
                false => Ok(()),
            },
            Within::Fields { padding, .. } => self.fields(bytes, padding),
        }
    }

    /// Section 6.5.2.
    fn settings(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        while self.piece.fill(&mut bytes) {
            let [a, b, value @ .., _, _, _] = self.piece.bytes;
            if [a, b] == INITIAL_WINDOW_SIZE && u32::from_be_bytes(value) > MOST_WINDOW {
                return Err(Reason::FLOW_CONTROL_ERROR);
            }
            self.piece = Piece::of(SETTING);
        }
        Ok(())
    }

    /// How much padding ends a frame of HEADERS of which this much is left (section 6.2).
    fn padding(&self, flags: u8, left: usize) -> Result<usize, Reason> {
        let (mut prefix, mut padding) = (self.piece.bytes, 0);
        if flags & PADDED != 0 {
            padding = usize::from(prefix[0]);
            prefix.rotate_left(1);
        }
        let [a, b, c, d, ..] = prefix;
        let depends = (flags & WITH_PRIORITY != 0).then_some(stream([a, b, c, d]));
        // The crate would leave the fields packed, and its table would not be the client's.
        let on_itself = depends.is_some() && depends == self.block.map(|block| block.stream);
        match on_itself || padding > left {
            true => Err(Reason::PROTOCOL_ERROR),
            false => Ok(padding),
        }
    }

    fn fields(&mut self, bytes: &[u8], padding: usize) -> Result<(), Reason> {
        let count = (self.left + bytes.len()).saturating_sub(padding).min(bytes.len());
        Ok(self.fields.read(&bytes[..count])?)
    }

    fn end(&mut self) -> Result<(), Reason> {
        if let Within::Fields { last: true, .. } = self.within {
            let seen = self.fields.end()?;
            let block = self.block.take().filter(|block| block.is_malformed(seen));
            self.malformed.extend(block.map(|block| block.stream));
        }
        (self.within, self.piece) = (Within::Header, Piece::of(Header::LENGTH));
        Ok(())
    }
}

/// What every frame begins with (section 4.1).
#[derive(Clone, Copy, Debug)]
struct Header {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Header {
    const LENGTH: usize = 9;

    fn read(bytes: [u8; Self::LENGTH]) -> Self {
        let [a, b, c, kind, flags, id @ ..] = bytes;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        Self { length, kind, flags, stream: stream(id) }
    }

    fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Length of what HEADERS have before the fields.
    fn prefix(self) -> usize {
        usize::from(self.has(PADDED)) + if self.has(WITH_PRIORITY) { 5 } else { 0 }
    }

    /// Whether it has the length that its kind asks for (section 4.2).
    fn fits(self) -> bool {
        let fits = match self.kind {
            DATA => self.length >= usize::from(self.has(PADDED)),
            HEADERS => self.length >= self.prefix(),
            PRIORITY => self.length == 5,
            RST_STREAM | WINDOW_UPDATE => self.length == 4,
            SETTINGS if self.has(ACK) => self.length == 0,
            SETTINGS => self.length.is_multiple_of(SETTING),
            PING => self.length == 8,
            GOAWAY => self.length >= 8,
            _ => true,
        };
        fits && self.length <= MOST_FRAME
    }
}

/// The first bit says nothing.
fn stream(id: [u8; 4]) -> u32 {
    u32::from_be_bytes(id) & (u32::MAX >> 1)
}

/// The streams that the client began.
#[derive(Debug, Default)]
struct Streams {
    /// In the order of their numbers.
    known: VecDeque<Stream>,
    newest: u32,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    number: u32,
    side: Side,
}

/// The client's side of a stream (section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Open,
    Ended,
    Reset,
}

impl Side {
    fn after(header: Header) -> Self {
        if header.has(END_STREAM) { Self::Ended } else { Self::Open }
    }
}

impl Streams {
    /// Data may come after a reset, which the crate answers; after the end there is none.
    fn data(&mut self, header: Header) -> Result<(), Reason> {
        match self.find(header.stream) {
            Some(stream) if stream.side == Side::Ended => Err(Reason::STREAM_CLOSED),
            Some(stream) if stream.side == Side::Open => {
                stream.side = Side::after(header);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn headers(&mut self, header: Header) -> Result<Section, Reason> {
        if header.stream > self.newest {
            self.begin(Stream { number: header.stream, side: Side::after(header) });
            return Ok(Section::Head);
        }
        match self.find(header.stream) {
            Some(stream) if stream.side != Side::Open => return Err(Reason::STREAM_CLOSED),
            Some(stream) => stream.side = Side::after(header),
            None => {}
        }
        Ok(Section::Trailers)
    }

    fn reset(&mut self, number: u32) {
        if let Some(stream) = self.find(number) {
            stream.side = Side::Reset;
        }
    }

    /// Of too many, the oldest that is over is forgotten: then the crate names its faults.
    fn begin(&mut self, stream: Stream) {
        if self.known.len() == MOST_STREAMS {
            let over = self.known.iter().position(|known| known.side != Side::Open);
            self.known.remove(over.unwrap_or(0));
        }
        self.newest = stream.number;
        self.known.push_back(stream);
    }

    fn find(&mut self, number: u32) -> Option<&mut Stream> {
        let at = self.known.binary_search_by_key(&number, |stream| stream.number).ok()?;
        self.known.get_mut(at)
    }
}

/// Bytes that have to be there together.
#[derive(Clone, Copy, Debug)]
struct Piece {
    bytes: [u8; Header::LENGTH],
    there: usize,
    length: usize,
}

impl Piece {
    fn of(length: usize) -> Self {
        Self { bytes: [0; Header::LENGTH], there: 0, length }
    }

    /// Takes what is missing; whether it is whole now.
    fn fill(&mut self, from: &mut &[u8]) -> bool {
        let part = take(from, self.length - self.there);
        self.bytes[self.there..][..part.len()].copy_from_slice(part);
        self.there += part.len();
        self.there == self.length
    }
}

/// As many bytes as there are, but no more than so many.
fn take<'b>(from: &mut &'b [u8], most: usize) -> &'b [u8] {
    let (taken, rest) = from.split_at(most.min(from.len()));
    *from = rest;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    /// However many streams there were, a reader takes no more memory, and it knows those that have
    /// not ended.
    #[test]
    fn only_so_many_streams_are_known() {
        let mut reader = Reader::default();
        reader.read(PREFACE).unwrap();
        reader.read(&frame(HEADERS, END_HEADERS, 1, &[])).unwrap();
        for number in (3..2000).step_by(2) {
            let flags = END_HEADERS | END_STREAM;
            reader.read(&frame(HEADERS, flags, number, &[])).unwrap();
        }
        assert_eq!(reader.streams.known.len(), MOST_STREAMS);
        reader.read(&frame(DATA, END_STREAM, 1, &[])).unwrap();
        let after = Err(Fault { reason: Reason::STREAM_CLOSED, before: 0 });
        assert_eq!(reader.read(&frame(DATA, 0, 1, &[])), after);

        let mut reader = Reader::default();
        reader.read(PREFACE).unwrap();
        for number in (1..2000).step_by(2) {
            reader.read(&frame(HEADERS, END_HEADERS, number, &[])).unwrap();
        }
        assert_eq!(reader.streams.known.len(), MOST_STREAMS);
        reader.read(&frame(DATA, END_STREAM, 1, &[])).unwrap();
        reader.read(&frame(DATA, 0, 1, &[])).unwrap();
    }
}
