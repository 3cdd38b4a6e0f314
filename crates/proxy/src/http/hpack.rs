//! What the compressed fields of HTTP/2 are like (RFC 7541), told as their bytes pass.
//!
//! The crate that unpacks them calls every fault in them by one name, and does not tell what it
//! drops. This keeps of a field how long it is, how it begins and little else: as much as it takes
//! to see where fields end, which of them the table holds, and whether one must not be there.

use std::collections::VecDeque;

use memchr::memchr;

/// Size of the table, in the protocol's own count (section 4.1).
const MOST_TABLE: usize = 4096;
/// What each field in the table takes besides its bytes (section 4.1).
const OVERHEAD: usize = 32;

/// The fields cannot be unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// Their coding is wrong.
    Coding,
    /// One has no name. Where more of the block comes the crate forgets it, and its table is no
    /// longer the client's.
    NoName,
}

/// What there is in a block of fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Of the names and values of whole fields.
    length: usize,
    /// There is a field.
    any: bool,
    /// There is one that is no pseudo-header.
    regular: bool,
    /// A bit for each pseudo-header that there is.
    pseudo: u8,
    /// One must not be there, or not where it is (RFC 9113 sections 8.2.2 and 8.3).
    pub(super) malformed: bool,
}

impl Seen {
    fn add(&mut self, field: Field) {
        self.any = true;
        self.length += field.length();
        self.malformed |= field.malformed;
        match field.name.kind {
            Kind::Pseudo(bit) => {
                self.malformed |= self.regular || self.pseudo & bit != 0;
                self.pseudo |= bit;
            }
            _ => self.regular = true,
        }
    }

    /// Whether there is a pseudo-header.
    pub(super) fn has_pseudo(self) -> bool {
        self.pseudo != 0
    }
}

/// Reads one block after the other.
#[derive(Debug, Default)]
pub(super) struct Reader {
    table: Table,
    step: Step,
    seen: Seen,
}

/// What the next byte is.
#[derive(Clone, Copy, Debug, Default)]
enum Step {
    /// The first of a field.
    #[default]
    Field,
    /// More of a number, of which this much is there.
    Number { of: Number, value: usize, shift: u32 },
    /// The first of the length of a string.
    Length(Part),
    /// A part of a string.
    Text(Part, Text),
}

/// What a number is for.
#[derive(Clone, Copy, Debug)]
enum Number {
    /// Index of a field.
    Field,
    /// Index of a name, 0: a string is.
    Name { kept: bool },
    /// Size of the table.
    Table,
    /// Length of a string.
    Text { of: Part, huffman: bool },
}

/// What a string is, of a field that the table may keep.
#[derive(Clone, Copy, Debug)]
enum Part {
    Name { kept: bool },
    Value { name: Name, kept: bool },
}

impl Reader {
    /// Reads more of a block.
    ///
    /// # Errors
    ///
    /// Nothing that comes can be unpacked any more.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), Broken> {
        while let [byte, rest @ ..] = bytes {
            (self.step, bytes) = match self.step {
                Step::Field => (self.begin_field(*byte)?, rest),
                Step::Number { of, value, shift } => {
                    (self.more_number(of, value, shift, *byte)?, rest)
                }
                Step::Length(of) => {
                    let of = Number::Text { of, huffman: byte & 0x80 != 0 };
                    (self.begin_number(of, *byte, 7)?, rest)
                }
                Step::Text(of, mut text) => {
                    let (piece, rest) = bytes.split_at(text.left.min(bytes.len()));
                    text.read(piece)?;
                    (self.text(of, text)?, rest)
                }
            };
        }
        Ok(())
    }

    /// Names and values of the block that is under way, as far as they are there.
    pub(super) fn length(&self) -> usize {
        let under_way = match self.step {
            Step::Text(Part::Name { .. }, text) => text.length,
            Step::Text(Part::Value { name, .. }, text) => name.length + text.length,
            _ => 0,
        };
        self.seen.length + under_way as usize
    }

    /// Ends a block.
    ///
    /// # Errors
    ///
    /// A field has not ended.
    pub(super) fn end(&mut self) -> Result<Seen, Broken> {
        match self.step {
            Step::Field => Ok(std::mem::take(&mut self.seen)),
            _ => Err(Broken::Coding),
        }
    }

    /// The first byte tells what a field is made of (section 6).
    fn begin_field(&mut self, byte: u8) -> Result<Step, Broken> {
        let (of, bits) = match byte {
            0x80.. => (Number::Field, 7),
            0x40.. => (Number::Name { kept: true }, 6),
            // Only before the first field (section 4.2).
            0x20.. if self.seen.any => return Err(Broken::Coding),
            0x20.. => (Number::Table, 5),
            _ => (Number::Name { kept: false }, 4),
        };
        self.begin_number(of, byte, bits)
    }

    /// A number begins in the last bits of a byte (section 5.1).
    fn begin_number(&mut self, of: Number, byte: u8, bits: u32) -> Result<Step, Broken> {
        let most = (1 << bits) - 1;
        let value = usize::from(byte) & most;
        match value == most {
            true => Ok(Step::Number { of, value, shift: 0 }),
            false => self.number(of, value),
        }
    }

    fn more_number(
        &mut self,
        of: Number,
        value: usize,
        shift: u32,
        byte: u8,
    ) -> Result<Step, Broken> {
        // As many bytes as the crate takes: more than any length needs.
        const MOST_SHIFT: u32 = 21;
        let value = value + (usize::from(byte & 0x7f) << shift);
        match byte & 0x80 != 0 {
            false => self.number(of, value),
            true if shift == MOST_SHIFT => Err(Broken::Coding),
            true => Ok(Step::Number { of, value, shift: shift + 7 }),
        }
    }

    fn number(&mut self, of: Number, value: usize) -> Result<Step, Broken> {
        match of {
            Number::Field => {
                self.seen.add(self.table.get(value)?);
                Ok(Step::Field)
            }
            Number::Name { kept } if value == 0 => Ok(Step::Length(Part::Name { kept })),
            Number::Name { kept } => {
                Ok(Step::Length(Part::Value { name: self.table.get(value)?.name, kept }))
            }
            Number::Table if value > MOST_TABLE => Err(Broken::Coding),
            Number::Table => {
                self.table.resize(value);
                Ok(Step::Field)
            }
            Number::Text { of, huffman } => self.text(of, Text::new(value, huffman)),
        }
    }

    /// What follows a string of which some was read.
    fn text(&mut self, of: Part, text: Text) -> Result<Step, Broken> {
        if text.left > 0 {
            return Ok(Step::Text(of, text));
        }
        text.end()?;
        match of {
            Part::Name { .. } if text.length == 0 => Err(Broken::NoName),
            Part::Name { kept } => {
                let name = Name { length: text.length, kind: Kind::of(text.beginning()) };
                Ok(Step::Length(Part::Value { name, kept }))
            }
            Part::Value { name, kept } => {
                let field = Field::new(name, text);
                if kept {
                    self.table.add(field);
                }
                self.seen.add(field);
                Ok(Step::Field)
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Name {
    length: u32,
    kind: Kind,
}

/// What a name says of its field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// It is the pseudo-header with this bit.
    Pseudo(u8),
    /// It belongs to a connection, and there are none of those here.
    OfConnection,
    Te,
    Other,
}

impl Kind {
    const PATH: Self = Self::Pseudo(1);

    /// Of a name, which need not be whole if it is longer than any that is looked for. Pseudo-headers
    /// that nobody knows end the connection, which is left to the crate.
    const fn of(name: &[u8]) -> Self {
        match name {
            b":path" => Self::PATH,
            b":method" => Self::Pseudo(2),
            b":scheme" => Self::Pseudo(4),
            b":authority" => Self::Pseudo(8),
            b":protocol" => Self::Pseudo(16),
            [b':', ..] => Self::Pseudo(32),
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding"
            | b"upgrade" => Self::OfConnection,
            b"te" => Self::Te,
            _ => Self::Other,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Field {
    name: Name,
    /// Length of the value.
    value: u32,
    /// No message has it.
    malformed: bool,
}

impl Field {
    fn new(name: Name, value: Text) -> Self {
        let malformed = match name.kind {
            Kind::OfConnection => true,
            Kind::Te => value.beginning() != b"trailers",
            // No target has a fragment (RFC 9113 section 8.3.1).
            Kind::PATH => value.has_number_sign,
            _ => false,
        };
        Self { name, value: value.length, malformed }
    }

    /// One of the table that every table begins with.
    const fn fixed(name: &str, value: &str) -> Self {
        let kind = Kind::of(name.as_bytes());
        let name = Name { length: name.len() as u32, kind };
        Self { name, value: value.len() as u32, malformed: matches!(kind, Kind::OfConnection) }
    }

    fn length(self) -> usize {
        self.name.length as usize + self.value as usize
    }

    fn size(self) -> usize {
        self.length() + OVERHEAD
    }
}

/// The fields that an index stands for (section 2.3).
#[derive(Debug)]
struct Table {
    /// The newest first.
    fields: VecDeque<Field>,
    size: usize,
    most: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self { fields: VecDeque::new(), size: 0, most: MOST_TABLE }
    }
}

impl Table {
    fn get(&self, index: usize) -> Result<Field, Broken> {
        let at = index.checked_sub(1).ok_or(Broken::Coding)?;
        let fixed = STATIC.get(at).copied();
        fixed.or_else(|| self.fields.get(at - STATIC.len()).copied()).ok_or(Broken::Coding)
    }

    /// A field that has no room leaves an empty table (section 4.4).
    fn add(&mut self, field: Field) {
        self.shrink(self.most.saturating_sub(field.size()));
        if field.size() <= self.most {
            self.size += field.size();
            self.fields.push_front(field);
        }
    }

    fn resize(&mut self, most: usize) {
        self.most = most;
        self.shrink(most);
    }

    fn shrink(&mut self, most: usize) {
        while self.size > most {
            let oldest = self.fields.pop_back();
            self.size -= oldest.map_or(self.size, Field::size);
        }
    }
}

/// A string that is under way.
#[derive(Clone, Copy, Debug)]
struct Text {
    /// Of its bytes.
    left: usize,
    /// Bits whose code has not ended, where they are coded.
    huffman: Option<Bits>,
    /// Of what was read, unpacked.
    length: u32,
    /// As much of that.
    beginning: [u8; Self::BEGINNING],
    has_number_sign: bool,
}

impl Text {
    /// Tells what anybody looks for, the longest of which is `transfer-encoding`, from what only
    /// begins like it.
    const BEGINNING: usize = 18;

    fn new(left: usize, huffman: bool) -> Self {
        let huffman = huffman.then(Bits::default);
        Self { left, huffman, length: 0, beginning: [0; Self::BEGINNING], has_number_sign: false }
    }

    fn beginning(&self) -> &[u8] {
        &self.beginning[..Self::BEGINNING.min(self.length as usize)]
    }

    /// More of it, unpacked.
    fn add(&mut self, characters: &[u8]) {
        let room = self.beginning.iter_mut().skip(self.length as usize);
        room.zip(characters).for_each(|(place, character)| *place = *character);
        self.has_number_sign |= memchr(b'#', characters).is_some();
        self.length += characters.len() as u32;
    }

    fn read(&mut self, piece: &[u8]) -> Result<(), Broken> {
        self.left -= piece.len();
        let Some(mut bits) = self.huffman else {
            self.add(piece);
            return Ok(());
        };
        for bytes in piece.chunks(Bits::ROOM) {
            bytes.iter().for_each(|byte| bits.add(*byte));
            while let Some(character) = bits.next()? {
                self.add(&[character]);
            }
        }
        self.huffman = Some(bits);
        Ok(())
    }

    fn end(&self) -> Result<(), Broken> {
        self.huffman.map_or(Ok(()), Bits::end)
    }
}

/// Bits that stand for no character yet, the first of them in front.
#[derive(Clone, Copy, Debug, Default)]
struct Bits {
    bits: u64,
    count: u32,
}

impl Bits {
    /// For how many bytes there always is room: less than the longest code is left of those before.
    const ROOM: usize = 4;

    fn add(&mut self, byte: u8) {
        self.bits |= u64::from(byte) << (u64::BITS - u8::BITS - self.count);
        self.count += u8::BITS;
    }

    /// The next character, if its code is whole; that of the end of a string stands for none.
    fn next(&mut self) -> Result<Option<u8>, Broken> {
        let front = (self.bits >> u32::BITS) as u32;
        let codes = CODES.iter().find(|codes| front < codes.end).ok_or(Broken::Coding)?;
        if codes.length > self.count {
            return Ok(None);
        }
        self.bits <<= codes.length;
        self.count -= codes.length;
        let back = (codes.end - 1 - front) >> (u32::BITS - codes.length);
        Ok(Some(CHARACTERS.get((codes.last - back) as usize).copied().unwrap_or_default()))
    }

    /// What fills up the last byte is less than one, of ones (section 5.2).
    fn end(self) -> Result<(), Broken> {
        match self.count < u8::BITS && self.bits == !(u64::MAX >> self.count) {
            true => Ok(()),
            false => Err(Broken::Coding),
        }
    }
}

/// How many characters have a code of which length (appendix B). The end of a string, which has the
/// last of the longest codes, is none.
const COUNTS: [(u32, u32); 21] = [
    (5, 10),
    (6, 26),
    (7, 32),
    (8, 6),
    (10, 5),
    (11, 3),
    (12, 2),
    (13, 6),
    (14, 2),
    (15, 3),
    (19, 3),
    (20, 8),
    (21, 13),
    (22, 26),
    (23, 29),
    (24, 12),
    (25, 4),
    (26, 15),
    (27, 19),
    (28, 29),
    (30, 3),
];

/// Characters in the order of their codes, as far as anybody looks for them.
const CHARACTERS: &[u8] = b"012aceiost %-./3456789=A_bdfghlmnpru:BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz\
    &*,;XZ!\"()?'+|#";

/// Codes of one length. All are numbered without a gap, the shortest first: so 32 bits begin with a
/// code of the first length whose end is above them.
#[derive(Clone, Copy)]
struct Codes {
    length: u32,
    end: u32,
    /// The place of their last character.
    last: u32,
}

const CODES: [Codes; COUNTS.len()] = {
    let mut codes = [Codes { length: 0, end: 0, last: 0 }; COUNTS.len()];
    let (mut at, mut end, mut characters) = (0, 0, 0);
    while at < codes.len() {
        let (length, count) = COUNTS[at];
        end += count << (u32::BITS - length);
        characters += count;
        codes[at] = Codes { length, end, last: characters - 1 };
        at += 1;
    }
    codes
};

/// The fields that every table begins with (appendix A).
const STATIC: [Field; 61] = {
    const FIELDS: [(&str, &str); 61] = [
        (":authority", ""),
        (":method", "GET"),
        (":method", "POST"),
        (":path", "/"),
        (":path", "/index.html"),
        (":scheme", "http"),
        (":scheme", "https"),
        (":status", "200"),
        (":status", "204"),
        (":status", "206"),
        (":status", "304"),
        (":status", "400"),
        (":status", "404"),
        (":status", "500"),
        ("accept-charset", ""),
        ("accept-encoding", "gzip, deflate"),
        ("accept-language", ""),
        ("accept-ranges", ""),
        ("accept", ""),
        ("access-control-allow-origin", ""),
        ("age", ""),
        ("allow", ""),
        ("authorization", ""),
        ("cache-control", ""),
        ("content-disposition", ""),
        ("content-encoding", ""),
        ("content-language", ""),
        ("content-length", ""),
        ("content-location", ""),
        ("content-range", ""),
        ("content-type", ""),
        ("cookie", ""),
        ("date", ""),
        ("etag", ""),
        ("expect", ""),
        ("expires", ""),
        ("from", ""),
        ("host", ""),
        ("if-match", ""),
        ("if-modified-since", ""),
        ("if-none-match", ""),
        ("if-range", ""),
        ("if-unmodified-since", ""),
        ("last-modified", ""),
        ("link", ""),
        ("location", ""),
        ("max-forwards", ""),
        ("proxy-authenticate", ""),
        ("proxy-authorization", ""),
        ("range", ""),
        ("referer", ""),
        ("refresh", ""),
        ("retry-after", ""),
        ("server", ""),
        ("set-cookie", ""),
        ("strict-transport-security", ""),
        ("transfer-encoding", ""),
        ("user-agent", ""),
        ("vary", ""),
        ("via", ""),
        ("www-authenticate", ""),
    ];
    let mut fields = [Field::fixed("", ""); 61];
    let mut at = 0;
    while at < FIELDS.len() {
        let (name, value) = FIELDS[at];
        fields[at] = Field::fixed(name, value);
        at += 1;
    }
    fields
};
