//! The wire format (protobuf.dev/programming-guides/encoding).

use super::{super::error::ApiError, malformed};

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field<'a> {
    /// Numbers and booleans.
    Integer(u64),
    /// Text, bytes, messages.
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    /// A signed number; negative ones are written as 64 bits.
    pub(super) fn integer(self) -> Result<i64, ApiError> {
        match self {
            Self::Integer(number) => Ok(number.cast_signed()),
            Self::Bytes(_) => Err(malformed("bytes where a number is due")),
        }
    }

    pub(super) fn bytes(self) -> Result<&'a [u8], ApiError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Integer(_) => Err(malformed("a number where bytes are due")),
        }
    }
}

/// The fields of a message with their numbers. Ends after an error.
pub(super) fn fields(mut rest: &[u8]) -> impl Iterator<Item = Result<(u32, Field<'_>), ApiError>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = next(&mut rest);
        if field.is_err() {
            rest = &[];
        }
        Some(field)
    })
}

fn next<'a>(rest: &mut &'a [u8]) -> Result<(u32, Field<'a>), ApiError> {
    let tag = varint(rest)?;
    let number = u32::try_from(tag >> 3).map_err(|_| malformed("a field number"))?;
    let field = match tag & 7 {
        0 => Field::Integer(varint(rest)?),
        2 => {
            let length = usize::try_from(varint(rest)?).unwrap_or(usize::MAX);
            let (bytes, after) =
                rest.split_at_checked(length).ok_or_else(|| malformed("it ends in a field"))?;
            *rest = after;
            Field::Bytes(bytes)
        }
        other => return Err(malformed(format!("wire type {other} in field {number}"))),
    };
    Ok((number, field))
}

/// Seven bits a byte, the lowest first; at most ten bytes.
fn varint(rest: &mut &[u8]) -> Result<u64, ApiError> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (byte, after) = rest.split_first().ok_or_else(|| malformed("it ends in a number"))?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift.min(63);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(malformed("a number of more than 64 bits"))
}

/// The numeric field `wanted` of a message, 0 where it is missing.
pub(super) fn number(bytes: &[u8], wanted: u32) -> Result<i64, ApiError> {
    for field in fields(bytes) {
        let (number, field) = field?;
        if number == wanted {
            return field.integer();
        }
    }
    Ok(0)
}
