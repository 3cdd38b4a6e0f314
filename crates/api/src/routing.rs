//! How pods of different nodes reach each other.

use std::{fmt, str::FromStr};

/// The ways. The words are those of every setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// The network between the nodes knows where pods are, or the nodes are each other's next hops.
    #[default]
    Native,
    /// In envelopes from node to node (VXLAN): the network between them need not know of pods.
    Overlay,
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Overlay => "overlay",
        })
    }
}

impl FromStr for Routing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "native" => Ok(Self::Native),
            "overlay" => Ok(Self::Overlay),
            _ => Err("it is `native` or `overlay`".into()),
        }
    }
}
