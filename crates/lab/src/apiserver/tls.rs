//! Certificates: an authority of the lab's own, the server's and the administrator's.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use serde::{Deserialize, Serialize};

/// The authority and what it has signed; kept with the objects so that a kubeconfig survives.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Material {
    ca: String,
    server: String,
    server_key: String,
    client: String,
    client_key: String,
    names: Vec<String>,
    /// Bearer token of the administrator, for clients that cannot use certificates.
    pub(super) token: String,
}

impl Material {
    /// A new authority with certificates for the server names and for the administrator.
    pub(super) fn generate(names: &[String]) -> anyhow::Result<Self> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "palisade-lab-ca");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca_certificate = ca.self_signed(&ca_key)?;
        let issuer = Issuer::new(ca, ca_key);

        let server_key = KeyPair::generate()?;
        let mut server = CertificateParams::new(names.to_vec())
            .context("the API server's certificate cannot carry one of its names")?;
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let server_certificate = server.signed_by(&server_key, &issuer)?;

        let client_key = KeyPair::generate()?;
        let mut client = CertificateParams::default();
        client.distinguished_name.push(DnType::CommonName, "kubernetes-admin");
        client.distinguished_name.push(DnType::OrganizationName, "system:masters");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        client.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let client_certificate = client.signed_by(&client_key, &issuer)?;

        Ok(Self {
            ca: ca_certificate.pem(),
            server: server_certificate.pem(),
            server_key: server_key.serialize_pem(),
            client: client_certificate.pem(),
            client_key: client_key.serialize_pem(),
            names: names.to_vec(),
            token: random_hex(32)?,
        })
    }

    /// Was this made for at least these names?
    pub(super) fn covers(&self, names: &[String]) -> bool {
        names.iter().all(|name| self.names.contains(name))
    }

    /// The authority's certificate.
    pub(super) fn ca(&self) -> &str {
        &self.ca
    }

    /// How connections are accepted: certificates are asked for but not demanded, as a bearer
    /// token does as well.
    pub(super) fn server_config(&self) -> anyhow::Result<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.as_bytes())?)?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .allow_unauthenticated()
                .build()?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(self.server.as_bytes())?],
                PrivateKeyDer::from_pem_slice(self.server_key.as_bytes())?,
            )?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    /// A kubeconfig with the administrator's certificate embedded.
    pub(super) fn kubeconfig(&self, server: &str) -> String {
        let embed = |pem: &str| STANDARD.encode(pem);
        format!(
            "apiVersion: v1\n\
             kind: Config\n\
             clusters:\n\
             - name: palisade-lab\n  \
               cluster:\n    \
                 server: {server}\n    \
                 certificate-authority-data: {}\n\
             users:\n\
             - name: palisade-lab\n  \
               user:\n    \
                 client-certificate-data: {}\n    \
                 client-key-data: {}\n\
             contexts:\n\
             - name: palisade-lab\n  \
               context:\n    \
                 cluster: palisade-lab\n    \
                 user: palisade-lab\n    \
                 namespace: default\n\
             current-context: palisade-lab\n",
            embed(&self.ca),
            embed(&self.client),
            embed(&self.client_key),
        )
    }
}

/// Names that every lab's server certificate carries.
pub(super) fn standard_names() -> Vec<String> {
    let names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    let addresses: [IpAddr; 4] = [
        IpAddr::from([127, 0, 0, 1]),
        IpAddr::from([0_u16, 0, 0, 0, 0, 0, 0, 1]),
        IpAddr::from([10, 96, 0, 1]),
        IpAddr::from([0xfd96_u16, 0, 0, 0, 0, 0, 0, 1]),
    ];
    names.iter().map(ToString::to_string).chain(addresses.iter().map(ToString::to_string)).collect()
}

/// `count` random bytes in hexadecimal.
pub(super) fn random_hex(count: usize) -> anyhow::Result<String> {
    let mut bytes = vec![0; count];
    fill_random(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Unpredictable bytes.
pub(super) fn fill_random(bytes: &mut [u8]) -> anyhow::Result<()> {
    let provider = rustls::crypto::ring::default_provider();
    provider.secure_random.fill(bytes).map_err(|_| anyhow::anyhow!("no random numbers available"))
}
