//! Readiness, liveness and startup probes, made from the pod's node.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use super::Target;
use super::container::unblock;
use super::exec::run_quietly;
use crate::sys::netns;

/// Where probes of a container go.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub(super) node_netns: PathBuf,
    pub(super) address: IpAddr,
    pub(super) container: Container,
    pub(super) target: Target,
    pub(super) scratch: PathBuf,
}

/// So many attempts follow each other quickly while a container has never been ready.
const EAGER: i32 = 20;
/// Pause between those.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Makes one attempt after another; tells each result that crosses a threshold.
pub(super) async fn watch(probe: &Probe, scene: &Scene, mut tell: impl FnMut(Result<(), String>)) {
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
    };
    let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
    let timeout = seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1));
    let needed = probe.success_threshold.unwrap_or(1).max(1);
    let tolerated = probe.failure_threshold.unwrap_or(3).max(1);
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let (mut good, mut bad) = (0, 0);
    let mut ever = false;
    loop {
        let result = match tokio::time::timeout(timeout, attempt(probe, scene)).await {
            Ok(result) => result.map_err(|error| format!("{error:#}")),
            Err(_) => Err(format!("no answer within {} s", timeout.as_secs())),
        };
        match result {
            Ok(()) => {
                (good, bad) = (good + 1, 0);
                if good == needed {
                    ever = true;
                    tell(Ok(()));
                }
            }
            Err(reason) => {
                (good, bad) = (0, bad + 1);
                if bad == tolerated {
                    tell(Err(reason));
                }
            }
        }
        // A server that is just coming up should not wait out a whole period.
        let eager = !ever && bad <= EAGER;
        tokio::time::sleep(if eager { FIRST_PAUSE } else { period }).await;
    }
}

async fn attempt(probe: &Probe, scene: &Scene) -> anyhow::Result<()> {
    if let Some(http) = &probe.http_get {
        let host = http.host.as_deref().map_or(Ok(scene.address), str::parse)?;
        let port = port(&http.port, &scene.container)?;
        let path = http.path.as_deref().unwrap_or("/");
        return get(&scene.node_netns, SocketAddr::new(host, port), path).await;
    }
    if let Some(tcp) = &probe.tcp_socket {
        let host = tcp.host.as_deref().map_or(Ok(scene.address), str::parse)?;
        let port = port(&tcp.port, &scene.container)?;
        return connect(&scene.node_netns, SocketAddr::new(host, port)).await.map(drop);
    }
    if let Some(exec) = &probe.exec {
        let command = exec.command.clone().unwrap_or_default();
        let code = run_quietly(&scene.target, command, &scene.scratch).await?;
        if code != 0 {
            bail!("the command ended with exit code {code}");
        }
        return Ok(());
    }
    bail!("the lab supports httpGet, tcpSocket and exec probes")
}

fn port(port: &IntOrString, container: &Container) -> anyhow::Result<u16> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_ref() == Some(name))
            .map(|port| port.container_port),
    };
    let number = number.with_context(|| format!("no port named {port:?}"))?;
    Ok(u16::try_from(number)?)
}

/// The socket is made inside the node's network namespace and stays there.
async fn connect(netns: &Path, to: SocketAddr) -> anyhow::Result<tokio::net::TcpStream> {
    let netns = netns.to_owned();
    let socket = unblock(move || {
        netns::run_in(&netns, move || {
            let kind = socket2::Type::STREAM.nonblocking();
            socket2::Socket::new(socket2::Domain::for_address(to), kind, None)
        })
    })
    .await?;
    Ok(TcpSocket::from_std_stream(socket.into()).connect(to).await?)
}

async fn get(netns: &Path, to: SocketAddr, path: &str) -> anyhow::Result<()> {
    let mut stream = connect(netns, to).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {to}\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = [0; 64];
    let mut length = 0;
    while length < 12 {
        let read = stream.read(&mut answer[length..]).await?;
        if read == 0 {
            bail!("the connection was closed");
        }
        length += read;
    }
    let status: u16 = std::str::from_utf8(&answer[9..12])?.parse()?;
    if !(200..400).contains(&status) {
        bail!("HTTP probe failed with statuscode: {status}");
    }
    Ok(())
}
