//! Fields of HTTP messages: which belong to the proxy, and what names and values may be.

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

/// Fields that the proxy writes itself, or that mean nothing beyond it. Servers that turn names
/// into variables read `x_role` as `x-role`, which is not what was judged, so names with an
/// underscore do not pass.
#[must_use]
pub fn is_own(name: &str) -> bool {
    is_hop(name)
        || matches!(name, "host" | "content-length" | "expect" | "trailer")
        || name.contains('_')
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
