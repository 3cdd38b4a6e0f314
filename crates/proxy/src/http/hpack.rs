//! What the compressed fields of HTTP/2 are like (RFC 7541), told as their bytes pass.
//!
//! The crate that unpacks them calls every fault in them by one name, and does not tell what it
//! drops. This unpacks nothing, and keeps of a field how long it is and little else: as much as it
//! takes to see where fields end, which of them the table holds, and whether one must not be there.

use std::collections::VecDeque;

use memchr::memchr;

/// Size of the table, in the protocol's own count (section 4.1).
const MOST_TABLE: usize = 4096;
/// What each field in the table takes besides its bytes (section 4.1).
const OVERHEAD: usize = 32;

/// The fields cannot be unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// What there is in a block of fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Of the names and values of whole fields.
    length: usize,
    /// There is a field.
    any: bool,
    /// There is a pseudo-header.
    pub(super) pseudo: bool,
    /// A path has a fragment.
    pub(super) fragment: bool,
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
            _ => Err(Broken),
        }
    }

    /// The first byte tells what a field is made of (section 6).
    fn begin_field(&mut self, byte: u8) -> Result<Step, Broken> {
        let (of, bits) = match byte {
            0x80.. => (Number::Field, 7),
            0x40.. => (Number::Name { kept: true }, 6),
            // Only before the first field (section 4.2).
            0x20.. if self.seen.any => return Err(Broken),
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
            true if shift == MOST_SHIFT => Err(Broken),
            true => Ok(Step::Number { of, value, shift: shift + 7 }),
        }
    }

    fn number(&mut self, of: Number, value: usize) -> Result<Step, Broken> {
        match of {
            Number::Field => Ok(self.field(self.table.get(value)?)),
            Number::Name { kept } if value == 0 => Ok(Step::Length(Part::Name { kept })),
            Number::Name { kept } => {
                Ok(Step::Length(Part::Value { name: self.table.get(value)?.name, kept }))
            }
            Number::Table if value > MOST_TABLE => Err(Broken),
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
            Part::Name { kept } => {
                let name = Name { length: text.length, is_pseudo: text.begins_with_colon };
                Ok(Step::Length(Part::Value { name, kept }))
            }
            Part::Value { name, kept } => {
                let field =
                    Field { name, value: text.length, has_number_sign: text.has_number_sign };
                if kept {
                    self.table.add(field);
                }
                Ok(self.field(field))
            }
        }
    }

    /// A field is there.
    fn field(&mut self, field: Field) -> Step {
        self.seen.any = true;
        self.seen.length += field.length();
        self.seen.pseudo |= field.name.is_pseudo;
        self.seen.fragment |= field.name.is_path() && field.has_number_sign;
        Step::Field
    }
}

#[derive(Clone, Copy, Debug)]
struct Name {
    length: u32,
    is_pseudo: bool,
}

impl Name {
    const fn new(name: &str) -> Self {
        Self { length: name.len() as u32, is_pseudo: matches!(name.as_bytes(), [b':', ..]) }
    }

    /// No other pseudo-header has so short a name (RFC 9113 section 8.3).
    fn is_path(self) -> bool {
        self.is_pseudo && self.length == ":path".len() as u32
    }
}

#[derive(Clone, Copy, Debug)]
struct Field {
    name: Name,
    /// Length of the value.
    value: u32,
    has_number_sign: bool,
}

impl Field {
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
        let at = index.checked_sub(1).ok_or(Broken)?;
        let fixed = STATIC.get(at).copied();
        fixed.or_else(|| self.fields.get(at - STATIC.len()).copied()).ok_or(Broken)
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
    begins_with_colon: bool,
    has_number_sign: bool,
}

impl Text {
    fn new(left: usize, huffman: bool) -> Self {
        let huffman = huffman.then(Bits::default);
        Self { left, huffman, length: 0, begins_with_colon: false, has_number_sign: false }
    }

    fn read(&mut self, piece: &[u8]) -> Result<(), Broken> {
        self.left -= piece.len();
        let Some(mut bits) = self.huffman else {
            self.begins_with_colon |= self.length == 0 && piece.first() == Some(&b':');
            self.has_number_sign |= memchr(b'#', piece).is_some();
            self.length += piece.len() as u32;
            return Ok(());
        };
        for bytes in piece.chunks(Bits::ROOM) {
            bytes.iter().for_each(|byte| bits.add(*byte));
            while let Some(code) = bits.next()? {
                self.begins_with_colon |= self.length == 0 && code == Code::COLON;
                self.has_number_sign |= code == Code::NUMBER_SIGN;
                self.length += 1;
            }
        }
        self.huffman = Some(bits);
        Ok(())
    }

    fn end(&self) -> Result<(), Broken> {
        self.huffman.map_or(Ok(()), Bits::end)
    }
}

/// A code of Huffman's method, in the last of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Code {
    bits: u32,
    length: u32,
}

impl Code {
    const COLON: Self = Self { bits: 0x5c, length: 7 };
    const NUMBER_SIGN: Self = Self { bits: 0xffa, length: 12 };
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

    /// The next character's code, if it is whole; that of the end of a string stands for none.
    fn next(&mut self) -> Result<Option<Code>, Broken> {
        let front = (self.bits >> u32::BITS) as u32;
        let (_, length) = *CODES.iter().find(|(end, _)| front < *end).ok_or(Broken)?;
        if length > self.count {
            return Ok(None);
        }
        self.bits <<= length;
        self.count -= length;
        Ok(Some(Code { bits: front >> (u32::BITS - length), length }))
    }

    /// What fills up the last byte is less than one, of ones (section 5.2).
    fn end(self) -> Result<(), Broken> {
        match self.count < u8::BITS && self.bits == !(u64::MAX >> self.count) {
            true => Ok(()),
            false => Err(Broken),
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

/// The codes are numbered without a gap, the shortest first. So 32 bits begin with a code of the
/// first length here whose number is above theirs.
const CODES: [(u32, u32); COUNTS.len()] = {
    let mut codes = COUNTS;
    let (mut at, mut end) = (0, 0);
    while at < codes.len() {
        let (length, count) = COUNTS[at];
        end += count << (u32::BITS - length);
        codes[at] = (end, length);
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
    let none = Field { name: Name::new(""), value: 0, has_number_sign: false };
    let mut fields = [none; 61];
    let mut at = 0;
    while at < FIELDS.len() {
        let (name, value) = FIELDS[at];
        fields[at] = Field { name: Name::new(name), value: value.len() as u32, ..none };
        at += 1;
    }
    fields
};
