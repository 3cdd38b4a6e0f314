//! The network configuration on standard input.

use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use palisade_api::cni::{Attachment, Code, Failure, Route};
use serde_json::{Map, Value};

use crate::environment::Command;

/// A configuration with its `prevResult` and a GC list is far shorter.
const MAX_INPUT: u64 = 8 << 20;

const PLUGIN_TYPE: &str = "palisade-cni";

/// The versions of the CNI specification, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub(crate) const ALL: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", Self::LATEST];
    pub(crate) const LATEST: &str = "1.1.0";

    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        match text {
            "0.3.1" => Ok(Self::V0_3_1),
            "0.4.0" => Ok(Self::V0_4_0),
            "1.0.0" => Ok(Self::V1_0_0),
            "1.1.0" => Ok(Self::V1_1_0),
            other => Err(Failure::new(
                Code::IncompatibleVersion,
                format!("cniVersion: {other:?} is not supported; use {}", Self::ALL.join(", ")),
            )),
        }
    }

    pub(crate) fn allows(self, command: Command) -> Result<(), Failure> {
        let (since, name) = match command {
            Command::Check => (Self::V0_4_0, "CHECK"),
            Command::Gc => (Self::V1_1_0, "GC"),
            Command::Status => (Self::V1_1_0, "STATUS"),
            _ => return Ok(()),
        };
        if self >= since {
            return Ok(());
        }
        let message = format!("cniVersion: {name} does not exist in this version");
        Err(Failure::new(Code::IncompatibleVersion, message))
    }
}

pub(crate) fn read(input: impl Read) -> Result<Map<String, Value>, Failure> {
    let mut text = Vec::new();
    input
        .take(MAX_INPUT)
        .read_to_end(&mut text)
        .map_err(|error| Failure::new(Code::Io, format!("cannot read standard input: {error}")))?;
    serde_json::from_slice(&text).map_err(|error| {
        Failure::new(Code::InvalidJson, format!("the network configuration: {error}"))
    })
}

/// The checked configuration.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) version: Version,
    pub(crate) version_text: String,
    pub(crate) name: String,
    pub(crate) socket: PathBuf,
    pub(crate) prev_result: Option<Map<String, Value>>,
    valid_attachments: Option<Value>,
}

impl Config {
    pub(crate) fn parse(document: &Map<String, Value>) -> Result<Self, Failure> {
        let version_text = text(document, "cniVersion")?;
        let version = Version::parse(&version_text)?;
        let name = text(document, "name")?;
        let safe = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if !name.as_bytes()[0].is_ascii_alphanumeric() || !name.bytes().all(safe) {
            return Err(invalid(format!(
                "name: {name:?} must start with a letter or digit and go on with those, `_`, \
                 `.`, `-`"
            )));
        }
        let plugin = text(document, "type")?;
        if plugin != PLUGIN_TYPE {
            return Err(invalid(format!("type: {plugin:?} is not {PLUGIN_TYPE:?}")));
        }
        let socket = PathBuf::from(text(document, "agentSocket")?);
        if !socket.is_absolute() {
            return Err(invalid("agentSocket: must be an absolute path".to_owned()));
        }
        let prev_result = match document.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(Value::Object(result)) => Some(result.clone()),
            Some(_) => return Err(invalid("prevResult: must be an object".to_owned())),
        };
        let valid_attachments = document
            .get("cni.dev/valid-attachments")
            // The first drafts of the specification called it so, and libcni still writes it.
            .or_else(|| document.get("cni.dev/attachments"))
            .cloned();
        Ok(Self { version, version_text, name, socket, prev_result, valid_attachments })
    }

    /// Without the list nothing may be collected: everything would be.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<Attachment>, Failure> {
        match &self.valid_attachments {
            None => Err(invalid("cni.dev/valid-attachments: is missing".to_owned())),
            Some(Value::Null) => Ok(Vec::new()),
            Some(list) => serde_json::from_value(list.clone())
                .map_err(|error| invalid(format!("cni.dev/valid-attachments: {error}"))),
        }
    }

    /// What `prevResult` says about our interface: MAC address, addresses, routes.
    #[expect(clippy::type_complexity, reason = "three fields of one message, taken apart once")]
    pub(crate) fn previous(
        &self,
        ifname: &str,
        netns: &Path,
    ) -> Result<(Option<String>, Vec<IpNet>, Vec<Route>), Failure> {
        let Some(result) = &self.prev_result else {
            return Err(invalid("prevResult: is missing; CHECK compares with it".to_owned()));
        };
        let interfaces = array(result, "interfaces");
        let ours = interfaces.iter().position(|interface| {
            interface["name"] == ifname
                && interface["sandbox"].as_str().map(Path::new) == Some(netns)
        });
        let Some(ours) = ours else {
            return Err(invalid(format!("prevResult.interfaces: {ifname} is not among them")));
        };
        let mac = interfaces[ours]["mac"].as_str().filter(|mac| !mac.is_empty());
        let mut addresses = Vec::new();
        for ip in array(result, "ips") {
            if ip["interface"].as_u64().is_none_or(|index| index == ours as u64) {
                addresses.push(parse(&ip["address"], "prevResult.ips[].address")?);
            }
        }
        let mut routes = Vec::new();
        for route in array(result, "routes") {
            let gw: Option<IpAddr> = match route["gw"].as_str() {
                None | Some("") => None,
                Some(_) => Some(parse(&route["gw"], "prevResult.routes[].gw")?),
            };
            routes.push(Route { dst: parse(&route["dst"], "prevResult.routes[].dst")?, gw });
        }
        Ok((mac.map(str::to_owned), addresses, routes))
    }
}

fn array<'a>(object: &'a Map<String, Value>, key: &str) -> &'a [Value] {
    object.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn parse<T: std::str::FromStr>(value: &Value, field: &str) -> Result<T, Failure> {
    let parsed = value.as_str().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| invalid(format!("{field}: {value} is not an address")))
}

fn text(document: &Map<String, Value>, key: &str) -> Result<String, Failure> {
    match document.get(key) {
        Some(Value::String(value)) if !value.is_empty() => Ok(value.clone()),
        Some(other) => Err(invalid(format!("{key}: {other} is not a non-empty string"))),
        None => Err(invalid(format!("{key}: is missing"))),
    }
}

fn invalid(message: String) -> Failure {
    Failure::new(Code::InvalidConfig, message)
}
