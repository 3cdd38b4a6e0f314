//! Fields of HTTP messages: which belong to the proxy, and what a value may be.

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

/// Fields between two neighbours.
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
    fn values_are_one_line_without_blanks_around_it() {
        for value in ["", "a", "a b\tc", "\u{fc}", "a, b;c=\"d\""] {
            assert!(is_value(value.as_bytes()), "{value:?}");
        }
        for value in ["a\n", "a\r\nb: c", "\n", "\0", "a\u{7f}", " a", "a ", "\t", "a\t"] {
            assert!(!is_value(value.as_bytes()), "{value:?}");
        }
    }
}
