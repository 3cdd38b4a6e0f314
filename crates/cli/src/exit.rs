//! Exit codes, the same for every command.

use std::{fmt, process::ExitCode};

use palisade_api::client::chain;

/// How the command ended. Clap itself exits with 2 on a wrong command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done; the answer is yes, where there was a question.
    Ok = 0,
    /// The command ran and the answer is no, or something failed on the way.
    No = 1,
    /// No agent, API server or lab answered.
    Unreachable = 3,
    /// What was asked about does not exist.
    NotFound = 4,
}

/// Shown at the end of `palisade --help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done; the answer is yes, where there was a question
  1  the command ran and the answer is no, or something failed on the way
  2  the command line is wrong
  3  no agent, API server or lab answered
  4  what was asked about does not exist";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with an exit code of its own and advice.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
    pub(crate) advice: Option<String>,
}

impl Failure {
    pub(crate) fn unreachable(message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { exit: Exit::Unreachable, message: message.into(), advice: Some(advice.into()) }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self { exit: Exit::NotFound, message: message.into(), advice: None }
    }

    /// As [`Failure::not_found`], with what to do about it.
    pub(crate) fn missing(message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { exit: Exit::NotFound, message: message.into(), advice: Some(advice.into()) }
    }

    pub(crate) fn refused(message: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { exit: Exit::No, message: message.into(), advice: Some(advice.into()) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Tells people about `error` and chooses the exit code.
pub(crate) fn report(error: &anyhow::Error) -> Exit {
    eprintln!("error: {}", chain(&**error));
    let Some(failure) = error.downcast_ref::<Failure>() else { return Exit::No };
    if let Some(advice) = &failure.advice {
        eprintln!("\n{advice}");
    }
    failure.exit
}
