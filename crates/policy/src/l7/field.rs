//! Fields of HTTP messages: which belong to the proxy, and what names and values may be.

use super::target::Malformed;

/// Whether the byte may be in a method or the name of a field (RFC 9110 section 5.6.2).
#[must_use]
pub const fn is_token(byte: u8) -> bool {
    let is_mark = matches!(
        byte,
        b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~'
    );
    is_mark || byte.is_ascii_alphanumeric()
}

/// Whether a value can stand in a message as it is: nothing in it ends its line, and there is no
/// blank around it, which readers take away.
#[must_use]
pub fn is_value(value: &[u8]) -> bool {
    let is_plain = |byte: &u8| *byte == b'\t' || !byte.is_ascii_control();
    let is_blank = |end: Option<&u8>| matches!(end, Some(b' ' | b'\t'));
    value.iter().all(is_plain) && !is_blank(value.first()) && !is_blank(value.last())
}

/// Without the spaces and tabs around it.
#[must_use]
pub fn trim(value: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let Some(first) = value.iter().position(|byte| !blank(byte)) else { return &[] };
    let last = value.iter().rposition(|byte| !blank(byte)).unwrap_or(first);
    &value[first..=last]
}

/// The value of a field that must not come twice, of all that it has.
///
/// # Errors
///
/// It has several.
pub fn only<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Result<Option<&'a [u8]>, Malformed> {
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        _ => Err(Malformed::bad("a field twice that may come once only")),
    }
}

/// Names of the fields that go no further than this hop, because `connection` names them.
#[derive(Clone, Debug)]
pub struct Hops(Vec<String>);

impl Hops {
    /// Reads the values of `connection`.
    ///
    /// # Errors
    ///
    /// One is no list of names, or would take away what frames or routes the message.
    pub fn read<'a>(values: impl Iterator<Item = &'a [u8]>) -> Result<Self, Malformed> {
        let mut names = Vec::new();
        for name in values.flat_map(|value| value.split(|byte| *byte == b',').map(trim)) {
            if name.is_empty() {
                continue;
            }
            if !name.iter().all(|byte| is_token(*byte)) {
                return Err(Malformed::bad("the connection field is no list of names"));
            }
            names.push(String::from_utf8_lossy(name).to_ascii_lowercase());
        }
        let vital = |name: &String| {
            matches!(name.as_str(), "host" | "content-length" | "transfer-encoding" | "expect")
        };
        if names.iter().any(vital) {
            return Err(Malformed::bad("the connection field names what must go further"));
        }
        Ok(Self(names))
    }

    /// Whether a name, in lower case, is among them.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        self.0.iter().any(|hop| hop == name)
    }

    /// Whether rules are asked about a field of the request, and it is forwarded.
    #[must_use]
    pub fn passes(&self, name: &str) -> bool {
        !(self.names(name) || is_own(name))
    }

    /// Whether a request without a body asks for a websocket, by the values of `upgrade`. Rules are
    /// asked about that as of [`WEBSOCKET`].
    pub fn ask_for_websocket<'a>(
        &self,
        method: &str,
        mut upgrade: impl Iterator<Item = &'a [u8]>,
    ) -> bool {
        method == "GET"
            && self.names("upgrade")
            && upgrade.any(|value| value.eq_ignore_ascii_case(WEBSOCKET.1))
    }
}

/// The field that asks for a websocket.
pub const WEBSOCKET: (&str, &[u8]) = ("upgrade", b"websocket");

/// Fields that the proxy writes itself, or that mean nothing beyond it. Servers that turn names
/// into variables read `x_role` as `x-role`, which is not what was judged, so names with an
/// underscore do not pass.
#[must_use]
pub fn is_own(name: &str) -> bool {
    is_hop(name)
        || matches!(name, "host" | "content-length" | "expect" | "trailer")
        || name.as_bytes().contains(&b'_')
}

/// Fields between two neighbours. `proxy-authorization` is none of them: nobody asked for this proxy,
/// so it is the server's, and rules may speak of it as of any other.
#[must_use]
pub fn is_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "http2-settings"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_have_letters_digits_and_some_marks() {
        let others: Vec<u8> = (0..=255).filter(|byte| !is_token(*byte)).collect();
        let visible = others.into_iter().filter(u8::is_ascii_graphic).collect::<Vec<_>>();
        assert_eq!(visible, b"\"(),/:;<=>?@[\\]{}");
        assert!(!b" \t\n\0\x7f\x80\xff".iter().any(|byte| is_token(*byte)));
    }

    #[test]
    fn what_says_who_asks_is_for_rules() {
        for name in ["authorization", "proxy-authorization", "cookie"] {
            assert!(!is_own(name), "{name}");
        }
        assert!(["host", "te", "proxy-connection"].into_iter().all(is_own));
    }

    #[test]
    fn values_are_one_line_without_blanks_around_it() {
        for value in ["", "a", "a b\tc", "\u{fc}", "a, b;c=\"d\""] {
            assert!(is_value(value.as_bytes()), "{value:?}");
        }
        for value in ["a\n", "a\r\nb: c", "\n", "\0", "a\u{7f}", " a", "a ", "\t", "a\t"] {
            assert!(!is_value(value.as_bytes()), "{value:?}");
        }
    }
}
