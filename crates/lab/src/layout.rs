//! Where everything of a lab lives: paths, names and addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::nodes::Program;

/// The most nodes that the address plan has room for.
pub const MAX_NODES: u8 = 64;
/// The DNS domain of the cluster.
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// The network namespace that holds the bridge between the nodes.
pub const FABRIC_NETNS: &str = "palisade-fabric";
/// Where named network namespaces live.
pub const NETNS_DIR: &str = "/run/netns";
/// Prefix of the network namespaces of pods.
pub const POD_NETNS_PREFIX: &str = "palisade-pod-";
/// The port of the API server on the fabric.
pub const API_PORT: u16 = 6443;
/// MTU of the fabric and the pods.
pub const MTU: u32 = 1500;

/// The fabric's own address: the API server for the nodes.
pub const FABRIC_V4: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 254);
/// The fabric's own IPv6 address.
pub const FABRIC_V6: Ipv6Addr = Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, 0xfe);
/// ClusterIP of the `kubernetes` Service.
pub const KUBERNETES_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// IPv6 ClusterIP of the `kubernetes` Service.
pub const KUBERNETES_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1);
/// ClusterIP of the cluster's DNS.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// IPv6 ClusterIP of the cluster's DNS.
pub const DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0xa);

/// The directories of one lab.
#[derive(Debug, Clone)]
pub struct Layout {
    run: PathBuf,
    bpffs: PathBuf,
}

impl Default for Layout {
    fn default() -> Self {
        Self { run: "/run/palisade/lab".into(), bpffs: "/sys/fs/bpf".into() }
    }
}

impl Layout {
    /// The run directory: everything in it goes away with the lab.
    pub fn run_dir(&self) -> &Path {
        &self.run
    }
    /// The kubeconfig for `kubectl` on this machine.
    pub fn kubeconfig(&self) -> PathBuf {
        self.run.join("kubeconfig")
    }
    /// The kubeconfig for programs inside the fabric: agents and the cluster DNS.
    pub fn node_kubeconfig(&self) -> PathBuf {
        self.run.join("node-kubeconfig/kubeconfig")
    }
    /// The socket that `status` asks.
    pub fn socket(&self) -> PathBuf {
        self.run.join("lab.sock")
    }
    /// The daemon's process id.
    pub fn pid_file(&self) -> PathBuf {
        self.run.join("pid")
    }
    /// What must be undone beyond the run directory, in [`crate::daemon::Undo`] form.
    pub fn undo_file(&self) -> PathBuf {
        self.run.join("undo.json")
    }
    /// Log files.
    pub fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }
    /// The daemon's log file.
    pub fn daemon_log(&self) -> PathBuf {
        self.logs().join("lab.log")
    }
    /// Working directories of pods.
    pub fn pods(&self) -> PathBuf {
        self.run.join("pods")
    }
    /// The agent's run directory of a node.
    pub fn node_run(&self, node: &NodePlan) -> PathBuf {
        self.run.join("nodes").join(&node.name)
    }
    /// The agent's state directory of a node.
    pub fn node_state(&self, node: &NodePlan) -> PathBuf {
        self.node_run(node).join("state")
    }
    /// The log of a node's program.
    pub fn log(&self, node: &NodePlan, program: Program) -> PathBuf {
        let name = program.file().trim_start_matches("palisade-");
        self.logs().join(format!("{}-{name}.log", node.name))
    }
    /// The agent's CNI socket of a node.
    pub fn cni_socket(&self, node: &NodePlan) -> PathBuf {
        self.node_run(node).join("cni.sock")
    }
    /// The agent's admin socket of a node.
    pub fn admin_socket(&self, node: &NodePlan) -> PathBuf {
        self.node_run(node).join("admin.sock")
    }
    /// Mount point of bpffs.
    pub fn bpffs_root(&self) -> &Path {
        &self.bpffs
    }
    /// All of a lab's directories on bpffs.
    pub fn bpffs_base(&self) -> PathBuf {
        self.bpffs.join("palisade")
    }
    /// A node's directory on bpffs.
    pub fn bpffs(&self, node: &NodePlan) -> PathBuf {
        self.bpffs_base().join(&node.name)
    }
}

/// The plan of one node: its name and its addresses follow from its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// 1-based number.
    pub number: u8,
    /// `node<number>`.
    pub name: String,
}

impl NodePlan {
    /// The plan of node `number`.
    pub fn new(number: u8) -> Self {
        Self { number, name: format!("node{number}") }
    }

    /// The plans of a lab with `count` nodes.
    pub fn all(count: u8) -> Vec<Self> {
        (1..=count).map(Self::new).collect()
    }

    /// The name of the node's network namespace.
    pub fn netns(&self) -> String {
        format!("palisade-{}", self.name)
    }

    /// The path of the node's network namespace.
    pub fn netns_path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(self.netns())
    }

    /// IPv4 address on the fabric.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 255, self.number)
    }

    /// IPv6 address on the fabric.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, u16::from(self.number))
    }

    /// Both addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4().into(), self.v6().into()]
    }

    /// IPv4 range of the node's pods.
    pub fn pods_v4(&self) -> Ipv4Net {
        Ipv4Net::new_assert(Ipv4Addr::new(10, 244, self.number, 0), 24)
    }

    /// IPv6 range of the node's pods.
    pub fn pods_v6(&self) -> Ipv6Net {
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd44, 0, 0, u16::from(self.number), 0, 0, 0, 0), 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_the_number() {
        let node = NodePlan::new(2);
        assert_eq!(node.v4().to_string(), "172.31.255.2");
        assert_eq!(node.v6().to_string(), "fd31::2");
        assert_eq!(node.pods_v4().to_string(), "10.244.2.0/24");
        assert_eq!(node.pods_v6().to_string(), "fd44:0:0:2::/64");
        assert_eq!(node.netns(), "palisade-node2");
    }
}
