//! What a real client of TLS says first.

use std::sync::Arc;

use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// The first message, for a server of this name.
pub(crate) fn hello(name: &str) -> Vec<u8> {
    let config = ClientConfig::builder().with_root_certificates(RootCertStore::empty());
    let name = name.to_owned().try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(config.with_no_client_auth()), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}
