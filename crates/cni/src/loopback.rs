//! The plugin that runtimes ask for the loopback interface of each pod, where no other one is
//! installed: this program under the name `loopback`.

use std::{fs::File, os::fd::AsFd, path::Path};

use palisade_api::cni::{Code, Failure};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use serde_json::{Map, Value, json};

use crate::{
    environment::{Command, netns},
    input::Version,
};

/// Its number in every network namespace.
const LOOPBACK: i32 = 1;
/// linux/rtnetlink.h, linux/netlink.h and linux/if.h.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const IFF_UP: u32 = 1;

/// Whether it was called by that name.
pub(crate) fn is_meant() -> bool {
    let called = std::env::args_os().next();
    called.is_some_and(|path| Path::new(&path).file_name().is_some_and(|it| it == "loopback"))
}

pub(crate) fn perform(
    command: Command,
    version: Version,
    document: &Map<String, Value>,
) -> Result<Option<Value>, Failure> {
    match command {
        Command::Add => {
            let netns = netns()?;
            enter(&netns)?;
            set_up().map_err(|errno| failed(&format!("cannot bring lo up: {errno}")))?;
            Ok(Some(result(version, document, &netns)))
        }
        Command::Check => {
            enter(&netns()?)?;
            let up = is_up().map_err(|errno| failed(&format!("cannot look at lo: {errno}")))?;
            if up { Ok(None) } else { Err(failed("lo is down")) }
        }
        // The interface goes with its namespace.
        Command::Del | Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

fn result(version: Version, document: &Map<String, Value>, netns: &Path) -> Value {
    let given = document.get("cniVersion").cloned().unwrap_or_default();
    if let Some(Value::Object(previous)) = document.get("prevResult") {
        let mut previous = previous.clone();
        previous.insert("cniVersion".to_owned(), given);
        return Value::Object(previous);
    }
    let ips = [("127.0.0.1/8", "4"), ("::1/128", "6")].map(|(address, family)| {
        let mut ip = json!({ "address": address, "interface": 0 });
        if version < Version::V1_0_0 {
            ip["version"] = family.into();
        }
        ip
    });
    json!({
        "cniVersion": given,
        "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": netns }],
        "ips": ips,
        "dns": {},
    })
}

fn enter(netns: &Path) -> Result<(), Failure> {
    let path = netns.display();
    let file = File::open(netns).map_err(|error| failed(&format!("{path}: {error}")))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| failed(&format!("cannot enter {path}: {errno}")))
}

fn set_up() -> Result<(), Errno> {
    ask(RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, IFF_UP).map(drop)
}

fn is_up() -> Result<bool, Errno> {
    Ok(ask(RTM_GETLINK, NLM_F_REQUEST, 0)? & IFF_UP != 0)
}

/// Says to the kernel that the flags of the interface are to be so; its flags, or zero where it
/// only acknowledges.
fn ask(kind: u16, how: u16, flags: u32) -> Result<u32, Errno> {
    let (family, kind_of_socket) = (AddressFamily::NETLINK, SocketType::RAW);
    // NETLINK_ROUTE is protocol 0.
    let socket = socket_with(family, kind_of_socket, SocketFlags::CLOEXEC, None)?;
    let header = [&32u32.to_ne_bytes()[..], &kind.to_ne_bytes(), &how.to_ne_bytes(), &[0; 8]];
    let family_and_type = [0; 4];
    let body =
        [&family_and_type[..], &LOOPBACK.to_ne_bytes(), &flags.to_ne_bytes(), &flags.to_ne_bytes()];
    send(&socket, &[header.concat(), body.concat()].concat(), SendFlags::empty())?;
    let mut answer = [0; 8192];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    let word = |at: usize| answer[..length].get(at..at + 4).and_then(|it| it.try_into().ok());
    let number = |at| word(at).map(u32::from_ne_bytes).ok_or(Errno::PROTO);
    if answer[4..6] != NLMSG_ERROR.to_ne_bytes() {
        return number(24);
    }
    match number(16)?.cast_signed() {
        0 => Ok(0),
        code => Err(Errno::from_raw_os_error(-code)),
    }
}

fn failed(message: &str) -> Failure {
    Failure::new(Code::Failed, message)
}
