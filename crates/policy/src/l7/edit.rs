//! What rules make of the headers of a request.

use super::{HeaderChange, HeaderEdit, field};

/// A change that would make another message of a request than the one that was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwritable;

impl Unwritable {
    /// For the log.
    pub const WHY: &str = "a rule would write a header that is none, or that is not a rule's";
}

/// Fields that rules may change.
pub trait Editable {
    /// Adds one. The name is a token in lower case, and the value one that fields can have.
    ///
    /// # Errors
    ///
    /// There is no room for it.
    fn add(&mut self, name: &str, value: &str) -> Result<(), Unwritable>;
    /// Removes those of a name, but for one value.
    fn remove(&mut self, name: &str, except: Option<&str>);
}

impl Editable for Vec<(String, Vec<u8>)> {
    fn add(&mut self, name: &str, value: &str) -> Result<(), Unwritable> {
        self.push((name.to_owned(), value.as_bytes().to_vec()));
        Ok(())
    }

    fn remove(&mut self, name: &str, except: Option<&str>) {
        let except = except.map(str::as_bytes);
        self.retain(|(other, value)| other != name || Some(&**value) == except);
    }
}

/// Makes changes. Whoever wrote the rules of one end must not get past the other end with them:
/// rules were checked when they were read, and what they would write is checked here all the same.
///
/// # Errors
///
/// The request must not be sent.
pub fn edit(edits: &[HeaderEdit], fields: &mut impl Editable) -> Result<(), Unwritable> {
    for HeaderEdit { name, change } in edits {
        if *change != HeaderChange::Log && (field::is_own(name) || !is_name(name)) {
            return Err(Unwritable);
        }
        match change {
            HeaderChange::Log => {}
            HeaderChange::Add(value) => write(fields, name, value)?,
            HeaderChange::Remove { except } => fields.remove(name, except.as_deref()),
            HeaderChange::Replace(value) => {
                fields.remove(name, None);
                write(fields, name, value)?;
            }
        }
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(field::is_token)
}

fn write(fields: &mut impl Editable, name: &str, value: &str) -> Result<(), Unwritable> {
    match field::is_value(value.as_bytes()) {
        true => fields.add(name, value),
        false => Err(Unwritable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(name: &str, change: HeaderChange) -> Result<Vec<(String, Vec<u8>)>, Unwritable> {
        let field = |name: &str, value: &[u8]| (name.to_owned(), value.to_vec());
        let mut fields = vec![field("x", b"1"), field("y", b"1"), field("x", b"2")];
        edit(&[HeaderEdit { name: name.into(), change }], &mut fields).map(|()| fields)
    }

    fn told(name: &str, change: HeaderChange) -> String {
        let fields = edited(name, change).expect("it can be written");
        let told = fields.iter().map(|(name, value)| format!("{name}{}", value.escape_ascii()));
        told.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_change_is_made() {
        let remove = |except: Option<&str>| HeaderChange::Remove { except: except.map(Into::into) };
        assert_eq!(told("x", HeaderChange::Log), "x1 y1 x2");
        assert_eq!(told("x", HeaderChange::Add("3".into())), "x1 y1 x2 x3");
        assert_eq!(told("x", HeaderChange::Replace("3".into())), "y1 x3");
        assert_eq!(told("x", remove(None)), "y1");
        assert_eq!(told("x", remove(Some("2"))), "y1 x2");
    }

    #[test]
    fn what_would_make_another_message_is_not_written() {
        let changes = || ["1", "1\r\nz: 1"].map(String::from).into_iter();
        for name in ["host", "content-length", "x_y", "x y", "", "x:"] {
            assert_eq!(edited(name, HeaderChange::Add("1".into())), Err(Unwritable), "{name}");
            assert_eq!(edited(name, HeaderChange::Remove { except: None }), Err(Unwritable));
            assert!(edited(name, HeaderChange::Log).is_ok(), "{name}");
        }
        for change in [HeaderChange::Add, HeaderChange::Replace] {
            let written =
                changes().map(|value| edited("proxy-authorization", change(value)).is_ok());
            assert_eq!(written.collect::<Vec<_>>(), [true, false]);
        }
    }
}
