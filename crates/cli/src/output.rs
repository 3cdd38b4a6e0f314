//! What every command prints: a table for people, or JSON.

use std::{
    fmt,
    io::{self, Write},
};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::exit::{Exit, Failure};

/// The `-o` flag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Prints a line. Who reads no further (`| head`) ends the command quietly.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// Prints a line on something that was done. What is under way is brought to its end, whether
/// anybody reads on or not.
macro_rules! note {
    ($($text:tt)*) => { $crate::output::aside(format_args!($($text)*)) };
}
pub(crate) use note;

/// See [`say!`].
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let Err(error) = writeln!(io::stdout().lock(), "{text}") else { return };
    if error.kind() == io::ErrorKind::BrokenPipe {
        std::process::exit(Exit::Ok as i32);
    }
    warn(format_args!("error: cannot print: {error}"));
    std::process::exit(Exit::No as i32);
}

/// See [`note!`].
pub(crate) fn aside(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// Prints a line on standard error, if anybody reads there.
pub(crate) fn warn(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// For commands that tell people what they do, and have nothing to say to programs but their exit
/// code.
pub(crate) fn for_people_only(format: Format, advice: &str) -> anyhow::Result<()> {
    match format {
        Format::Table => Ok(()),
        Format::Json => {
            let message = "this command has no JSON to print; its exit code says how it went";
            Err(Failure::refused(message, advice).into())
        }
    }
}

/// Writes `value` as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    say!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Writes `rows` below `titles`, aligned, without lines: what shell tools can cut.
pub(crate) fn table<R, C>(titles: &[&str], rows: R)
where
    R: IntoIterator<Item = C>,
    C: IntoIterator<Item = String>,
{
    say!("{}", render(titles, rows));
}

/// What [`table`] prints.
pub(crate) fn render<R, C>(titles: &[&str], rows: R) -> String
where
    R: IntoIterator<Item = C>,
    C: IntoIterator<Item = String>,
{
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// `-` where there is nothing.
pub(crate) fn dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_end_without_blanks() {
        let rows = [["1", "a\nb"], ["1000", ""]].map(|row| row.map(str::to_owned));
        let text = render(&["ID", "LABELS"], rows);
        assert_eq!(text, "ID     LABELS\n1      a\n       b\n1000");
    }
}
