//! Calling the CNI plugin as a container runtime does.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

/// A plugin that takes longer is killed.
const TIMEOUT: Duration = Duration::from_secs(60);

/// One attachment of a pod.
#[derive(Debug, Clone)]
pub(super) struct Attachment {
    pub(super) plugin: PathBuf,
    pub(super) node_netns: PathBuf,
    pub(super) agent_socket: PathBuf,
    pub(super) container_id: String,
    pub(super) pod_netns: PathBuf,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
}

impl Attachment {
    /// Attaches the pod and gives its addresses.
    pub(super) async fn add(&self) -> anyhow::Result<Vec<IpAddr>> {
        let output = self.call("ADD").await?;
        let result: Value = serde_json::from_slice(&output).context("the plugin's result")?;
        let addresses = result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect::<Vec<_>>();
        if addresses.is_empty() {
            bail!("the plugin's result names no address: {result}");
        }
        Ok(addresses)
    }

    /// Detaches the pod.
    pub(super) async fn delete(&self) -> anyhow::Result<()> {
        self.call("DEL").await.map(drop)
    }

    async fn call(&self, command: &str) -> anyhow::Result<Vec<u8>> {
        let directory = self.plugin.parent().unwrap_or(Path::new("/"));
        let configuration = json!({
            "cniVersion": "1.1.0",
            "name": "palisade",
            "type": "palisade-cni",
            "agentSocket": self.agent_socket,
        });
        let mut child = tokio::process::Command::new("/proc/self/exe")
            .arg("netns-exec")
            .arg(&self.node_netns)
            .arg("--")
            .arg(&self.plugin)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", &self.pod_netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", directory)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};\
                     K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                    self.namespace, self.name, self.container_id, self.uid
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.plugin.display()))?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(configuration.to_string().as_bytes()).await?;
        drop(stdin);
        let output = tokio::time::timeout(TIMEOUT, child.wait_with_output())
            .await
            .with_context(|| format!("{command} took longer than {} s", TIMEOUT.as_secs()))??;
        if output.status.success() {
            return Ok(output.stdout);
        }
        bail!(
            "plugin type=\"palisade-cni\" failed ({}): {}",
            command.to_lowercase(),
            explain(&output)
        )
    }
}

/// The plugin's own words, if it left any.
fn explain(output: &std::process::Output) -> String {
    if let Ok(error) = serde_json::from_slice::<Value>(&output.stdout)
        && let Some(message) = error["msg"].as_str()
    {
        return match error["details"].as_str() {
            Some(details) if !details.is_empty() => format!("{message}: {details}"),
            _ => message.to_owned(),
        };
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    format!("{}: {}", output.status, stderr.trim())
}
