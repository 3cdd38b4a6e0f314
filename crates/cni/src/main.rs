//! The CNI plugin: standard input to the agent's socket and back.
//!
//! It decides nothing and changes nothing but the queue of deletions: it checks its input, asks
//! the agent, and prints the answer in the form of the runtime's CNI version. Under the name of
//! `loopback` it is the plugin of that name.

mod agent;
mod environment;
mod input;
mod loopback;
mod output;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use environment::{Command, Environment};
use input::{Config, Version};
use palisade_api::cni::{Add, Check, Code, Failure, Gc, Operation, Response};
use serde_json::Value;

fn main() -> ExitCode {
    let mut version = Version::LATEST.to_owned();
    let (text, code) = match run(&mut version) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Err(failure) => {
            eprintln!("palisade-cni: {failure}");
            (output::error(&version, &failure), ExitCode::FAILURE)
        }
    };
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// `version` is set as soon as it is known, for the error message.
fn run(version: &mut String) -> Result<Option<Value>, Failure> {
    let command = Command::from_environment()?;
    let document = input::read(io::stdin().lock())?;
    if let Some(given) = document.get("cniVersion").and_then(Value::as_str) {
        given.clone_into(version);
    }
    if command == Command::Version {
        Version::parse(version)?;
        return Ok(Some(output::versions(version)));
    }
    if loopback::is_meant() {
        let version = Version::parse(version)?;
        version.allows(command)?;
        return loopback::perform(command, version, &document);
    }
    let config = Config::parse(&document)?;
    config.version.allows(command)?;
    let environment = Environment::read(command)?;
    perform(command, &config, &environment)
}

fn perform(
    command: Command,
    config: &Config,
    environment: &Environment,
) -> Result<Option<Value>, Failure> {
    match command {
        Command::Version => Ok(None),
        Command::Add => add(config, environment).map(Some),
        Command::Del => del(config, environment),
        Command::Check => check(config, environment),
        Command::Gc => {
            let gc = Gc { network: config.name.clone(), valid: config.valid_attachments()? };
            ask(config, Operation::Gc(gc), Duration::from_secs(60)).map(|_| None)
        }
        Command::Status => match ask(config, Operation::Status, Duration::from_secs(5)) {
            Ok(_) => Ok(None),
            Err(failure) if failure.code == Code::TryAgain => {
                Err(Failure { code: Code::NotAvailable, ..failure })
            }
            Err(failure) => Err(failure),
        },
    }
}

fn add(config: &Config, environment: &Environment) -> Result<Value, Failure> {
    let request = Add {
        attachment: environment.attachment()?,
        network: config.name.clone(),
        netns: environment.netns()?,
        pod: environment.pod()?,
    };
    match ask(config, Operation::Add(request), Duration::from_secs(30))? {
        Response::Attached(attached) => {
            let netns = environment.netns()?;
            Ok(output::result(config, &attached, &netns))
        }
        _ => Err(Failure::new(Code::Failed, "the agent's answer to ADD names no interface")),
    }
}

/// Succeeds without an agent: what is to be deleted is written down for the next one.
fn del(config: &Config, environment: &Environment) -> Result<Option<Value>, Failure> {
    let attachment = environment.attachment()?;
    match agent::ask(&config.socket, Operation::Del(attachment.clone()), Duration::from_secs(15)) {
        Ok(_) => {}
        Err(agent::Error::Refused(failure)) => return Err(failure),
        Err(agent::Error::Away(_)) => agent::queue_deletion(&config.socket, &attachment)?,
    }
    Ok(None)
}

fn check(config: &Config, environment: &Environment) -> Result<Option<Value>, Failure> {
    let attachment = environment.attachment()?;
    let netns = environment.netns()?;
    let (mac, addresses, routes) = config.previous(attachment.ifname.as_str(), &netns)?;
    let check = Check { attachment, netns, mac, addresses, routes };
    ask(config, Operation::Check(check), Duration::from_secs(10)).map(|_| None)
}

fn ask(config: &Config, operation: Operation, patience: Duration) -> Result<Response, Failure> {
    agent::ask(&config.socket, operation, patience).map_err(|error| match error {
        agent::Error::Refused(failure) => failure,
        agent::Error::Away(error) => Failure {
            code: Code::TryAgain,
            message: format!("the palisade agent does not answer at {}", config.socket.display()),
            details: error.to_string(),
        },
    })
}
