//! How pods of different nodes reach each other, and what is outside the cluster.

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

/// Whether pods reach what is outside the cluster with their node's address. The words are those of
/// every setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Masquerade {
    /// With an overlay, where the network knows no pods.
    #[default]
    Auto,
    /// With either routing.
    Always,
    /// Pods have their own addresses everywhere.
    Never,
}

impl Masquerade {
    /// Whether it is done with this routing.
    #[must_use]
    pub fn applies(self, routing: Routing) -> bool {
        match self {
            Self::Auto => routing == Routing::Overlay,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl fmt::Display for Masquerade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

impl FromStr for Masquerade {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            "never" => Ok(Self::Never),
            _ => Err("it is `auto`, `always` or `never`".into()),
        }
    }
}
