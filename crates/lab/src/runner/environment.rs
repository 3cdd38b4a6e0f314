//! What a container gets from its specification: environment, files, volumes, command line.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvFromSource, EnvVar, KeyToPath, Pod, Secret, Volume,
};
use kube::{Api, Client, ResourceExt};

use crate::container::{DEFAULT_PATH, Volume as Mount};
use crate::layout::{CLUSTER_DOMAIN, DNS_V4, KUBERNETES_V4, NodePlan};

/// The environment of a container.
pub(super) async fn variables(
    client: &Client,
    pod: &Pod,
    container: &Container,
    node: &NodePlan,
    addresses: &[IpAddr],
) -> anyhow::Result<Vec<(String, String)>> {
    let mut variables: BTreeMap<String, String> = [
        ("PATH", DEFAULT_PATH.to_owned()),
        ("HOME", "/root".to_owned()),
        ("HOSTNAME", hostname(pod, node)),
        ("KUBERNETES_SERVICE_HOST", KUBERNETES_V4.to_string()),
        ("KUBERNETES_SERVICE_PORT", "443".to_owned()),
        ("KUBERNETES_SERVICE_PORT_HTTPS", "443".to_owned()),
        ("KUBERNETES_PORT", format!("tcp://{KUBERNETES_V4}:443")),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        for (key, value) in all_values(client, pod, source).await? {
            // A name with `=` in it would be another name.
            if !key.is_empty() && !key.contains('=') {
                variables.insert(format!("{prefix}{key}"), value);
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) => Some(expand(value, &variables)),
            (None, Some(_)) => from_source(client, pod, variable, node, addresses).await?,
            (None, None) => Some(String::new()),
        };
        if let Some(value) = value {
            variables.insert(variable.name.clone(), value);
        }
    }
    Ok(variables.into_iter().collect())
}

/// Everything in the ConfigMap or Secret that an `envFrom` names.
async fn all_values(
    client: &Client,
    pod: &Pod,
    source: &EnvFromSource,
) -> anyhow::Result<Vec<(String, String)>> {
    let namespace = pod.namespace().unwrap_or_default();
    let values = match (&source.config_map_ref, &source.secret_ref) {
        (Some(map), None) => config_map(client, &namespace, &map.name, map.optional).await?,
        (None, Some(secret)) => {
            secret_data(client, &namespace, &secret.name, secret.optional).await?
        }
        _ => bail!("envFrom: write one configMapRef or one secretRef in each entry"),
    };
    let text = |value: Vec<u8>| String::from_utf8_lossy(&value).into_owned();
    Ok(values.into_iter().map(|(key, value)| (key, text(value))).collect())
}

/// The content of files and variables, by key.
type Values = BTreeMap<String, Vec<u8>>;

async fn config_map(
    client: &Client,
    namespace: &str,
    name: &str,
    optional: Option<bool>,
) -> anyhow::Result<Values> {
    let map = Api::<ConfigMap>::namespaced(client.clone(), namespace).get_opt(name).await?;
    if map.is_none() && optional != Some(true) {
        bail!("configmap {name:?} not found");
    }
    let map = map.unwrap_or_default();
    let text = map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes()));
    Ok(text.chain(map.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0))).collect())
}

async fn secret_data(
    client: &Client,
    namespace: &str,
    name: &str,
    optional: Option<bool>,
) -> anyhow::Result<Values> {
    let secret = Api::<Secret>::namespaced(client.clone(), namespace).get_opt(name).await?;
    if secret.is_none() && optional != Some(true) {
        bail!("secret {name:?} not found");
    }
    let data = secret.unwrap_or_default().data.unwrap_or_default();
    Ok(data.into_iter().map(|(k, v)| (k, v.0)).collect())
}

/// The files of a volume: all values under their keys, or those that are named, where they are
/// wanted.
fn files(
    mut values: Values,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
) -> anyhow::Result<Values> {
    let Some(items) = items.filter(|items| !items.is_empty()) else { return Ok(values) };
    let mut files = Values::new();
    for item in items {
        if Path::new(&item.path).is_absolute() || item.path.split('/').any(|part| part == "..") {
            bail!("items: path {:?} must stay inside the volume", item.path);
        }
        match values.remove(&item.key) {
            Some(value) => drop(files.insert(item.path.clone(), value)),
            None if optional == Some(true) => {}
            None => bail!("references non-existent key {:?}", item.key),
        }
    }
    Ok(files)
}

async fn from_source(
    client: &Client,
    pod: &Pod,
    variable: &EnvVar,
    node: &NodePlan,
    addresses: &[IpAddr],
) -> anyhow::Result<Option<String>> {
    let Some(source) = &variable.value_from else { return Ok(None) };
    let namespace = pod.namespace().unwrap_or_default();
    if let Some(field) = &source.field_ref {
        return field_value(pod, &field.field_path, node, addresses).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let map =
            Api::<ConfigMap>::namespaced(client.clone(), &namespace).get_opt(&key.name).await?;
        let value = map.and_then(|map| map.data?.get(&key.key).cloned());
        if value.is_none() && key.optional != Some(true) {
            bail!("couldn't find key {} in ConfigMap {namespace}/{}", key.key, key.name);
        }
        return Ok(value);
    }
    if let Some(key) = &source.secret_key_ref {
        let secret =
            Api::<Secret>::namespaced(client.clone(), &namespace).get_opt(&key.name).await?;
        let value = secret.and_then(|secret| secret.data?.remove(&key.key));
        if value.is_none() && key.optional != Some(true) {
            bail!("couldn't find key {} in Secret {namespace}/{}", key.key, key.name);
        }
        return Ok(value.map(|value| String::from_utf8_lossy(&value.0).into_owned()));
    }
    bail!("env {}: the lab supports fieldRef, configMapKeyRef and secretKeyRef here", variable.name)
}

fn field_value(
    pod: &Pod,
    path: &str,
    node: &NodePlan,
    addresses: &[IpAddr],
) -> anyhow::Result<String> {
    let in_map = |map: &BTreeMap<String, String>, rest: &str| {
        let key = rest.trim_start_matches("['").trim_end_matches("']");
        map.get(key).cloned().unwrap_or_default()
    };
    Ok(match path {
        "metadata.name" => pod.name_any(),
        "metadata.namespace" => pod.namespace().unwrap_or_default(),
        "metadata.uid" => pod.uid().unwrap_or_default(),
        "spec.nodeName" => node.name.clone(),
        "spec.serviceAccountName" => pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_else(|| "default".to_owned()),
        "status.hostIP" => node.v4().to_string(),
        "status.podIP" => addresses.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.podIPs" => addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","),
        _ => {
            if let Some(rest) = path.strip_prefix("metadata.labels") {
                in_map(pod.labels(), rest)
            } else if let Some(rest) = path.strip_prefix("metadata.annotations") {
                in_map(pod.annotations(), rest)
            } else {
                bail!("fieldRef {path:?} is not supported")
            }
        }
    })
}

/// Replaces `$(NAME)` by the variable's value; unknown names stay as they are, `$$` is one `$`.
pub(super) fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        if let Some(after) = tail.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) =
            tail.strip_prefix('(').and_then(|inner| inner.split_once(')'))
        {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            out.push('$');
            rest = tail;
        }
    }
    out.push_str(rest);
    out
}

/// The host name inside the pod.
pub(super) fn hostname(pod: &Pod, node: &NodePlan) -> String {
    let spec = pod.spec.as_ref();
    if spec.and_then(|spec| spec.host_network) == Some(true) {
        return node.name.clone();
    }
    let name = spec.and_then(|spec| spec.hostname.clone()).unwrap_or_else(|| pod.name_any());
    name.chars().take(63).collect::<String>().trim_end_matches(['-', '.']).to_owned()
}

/// The pod's own files in `/etc`.
pub(super) fn etc(pod: &Pod, node: &NodePlan, addresses: &[IpAddr]) -> Vec<(String, String)> {
    let hostname = hostname(pod, node);
    let namespace = pod.namespace().unwrap_or_default();
    let mut names = hostname.clone();
    if let Some(subdomain) = pod.spec.as_ref().and_then(|spec| spec.subdomain.as_ref()) {
        names = format!("{hostname}.{subdomain}.{namespace}.svc.{CLUSTER_DOMAIN}\t{hostname}");
    }
    let mut hosts = "# Managed by the pod runner.\n127.0.0.1\tlocalhost\n\
                     ::1\tlocalhost ip6-localhost ip6-loopback\n\
                     fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\n\
                     fe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
        .to_owned();
    for address in addresses {
        hosts.push_str(&format!("{address}\t{names}\n"));
    }
    let aliases = pod.spec.as_ref().and_then(|spec| spec.host_aliases.clone()).unwrap_or_default();
    for alias in aliases {
        let names = alias.hostnames.unwrap_or_default().join("\t");
        hosts.push_str(&format!("{}\t{names}\n", alias.ip));
    }
    let resolver = format!(
        "search {namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}\n\
         nameserver {DNS_V4}\noptions ndots:5{}\n",
        resolver_options(pod)
    );
    vec![
        ("hosts".to_owned(), hosts),
        ("hostname".to_owned(), format!("{hostname}\n")),
        ("resolv.conf".to_owned(), resolver),
    ]
}

/// What the pod adds to the options of its resolver.
fn resolver_options(pod: &Pod) -> String {
    let config = pod.spec.as_ref().and_then(|spec| spec.dns_config.as_ref());
    let options = config.iter().flat_map(|config| config.options.iter().flatten());
    options.fold(String::new(), |text, option| {
        let name = option.name.as_deref().unwrap_or_default();
        match &option.value {
            Some(value) => format!("{text} {name}:{value}"),
            None => format!("{text} {name}"),
        }
    })
}

/// Prepares the pod's volumes; where each one is found on the machine.
pub(super) async fn volumes(
    client: &Client,
    pod: &Pod,
    directory: &Path,
) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let namespace = pod.namespace().unwrap_or_default();
    let mut found = BTreeMap::new();
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let path = prepare(client, &namespace, volume, directory)
            .await
            .with_context(|| format!("MountVolume.SetUp failed for volume {:?}", volume.name))?;
        found.insert(volume.name.clone(), path);
    }
    Ok(found)
}

async fn prepare(
    client: &Client,
    namespace: &str,
    volume: &Volume,
    directory: &Path,
) -> anyhow::Result<PathBuf> {
    if let Some(host) = &volume.host_path {
        return Ok(PathBuf::from(&host.path));
    }
    let path = directory.join("volumes").join(&volume.name);
    tokio::fs::create_dir_all(&path).await?;
    if volume.empty_dir.is_some() {
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        return Ok(path);
    }
    for (name, content) in contents(client, namespace, volume).await? {
        let path = path.join(name);
        if let Some(parent) = path.parent() {
            tokio::fs::create_dir_all(parent).await?;
        }
        tokio::fs::write(path, content).await?;
    }
    Ok(path)
}

/// The files of a volume that is made of objects.
async fn contents(client: &Client, namespace: &str, volume: &Volume) -> anyhow::Result<Values> {
    if let Some(source) = &volume.config_map {
        let values = config_map(client, namespace, &source.name, source.optional).await?;
        return files(values, source.items.as_deref(), source.optional);
    }
    if let Some(source) = &volume.secret {
        let name = source.secret_name.clone().unwrap_or_default();
        let values = secret_data(client, namespace, &name, source.optional).await?;
        return files(values, source.items.as_deref(), source.optional);
    }
    let Some(projected) = &volume.projected else {
        bail!("the lab supports emptyDir, hostPath, configMap, secret and projected volumes");
    };
    let mut all = Values::new();
    for source in projected.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            let values = config_map(client, namespace, &source.name, source.optional).await?;
            all.extend(files(values, source.items.as_deref(), source.optional)?);
        } else if let Some(source) = &source.secret {
            let values = secret_data(client, namespace, &source.name, source.optional).await?;
            all.extend(files(values, source.items.as_deref(), source.optional)?);
        } else {
            bail!("projected.sources: the lab supports configMap and secret here");
        }
    }
    Ok(all)
}

/// Where a container wants the pod's volumes.
pub(super) fn mounts(
    container: &Container,
    volumes: &BTreeMap<String, PathBuf>,
) -> anyhow::Result<Vec<Mount>> {
    container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| {
            let source = volumes
                .get(&mount.name)
                .with_context(|| format!("volumeMount {:?} names no volume", mount.name))?;
            let sub = mount.sub_path.clone().unwrap_or_default();
            if Path::new(&sub).is_absolute() || sub.split('/').any(|part| part == "..") {
                bail!("subPath {sub:?} must stay inside the volume");
            }
            let source = if sub.is_empty() { source.clone() } else { source.join(sub) };
            Ok(Mount {
                source,
                target: PathBuf::from(&mount.mount_path),
                read_only: mount.read_only == Some(true),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expansion() {
        let variables = [("A".to_owned(), "1".to_owned())].into();
        assert_eq!(expand("x$(A)y $(B) $$(A) $", &variables), "x1y $(B) $(A) $");
    }
    #[test]
    fn items_name_files_inside_the_volume() {
        let values = || Values::from([("a".into(), b"1".to_vec()), ("b".into(), b"2".to_vec())]);
        let item = |key: &str, path: &str| KeyToPath {
            key: key.into(),
            path: path.into(),
            ..KeyToPath::default()
        };
        let got = |items: &[KeyToPath], optional| files(values(), Some(items), optional);
        assert_eq!(files(values(), None, None).unwrap(), values());
        let one = got(&[item("a", "x/y")], None).unwrap();
        assert_eq!(one, Values::from([("x/y".into(), b"1".to_vec())]));
        assert!(got(&[item("c", "x")], None).is_err());
        assert!(got(&[item("c", "x")], Some(true)).unwrap().is_empty());
        for path in ["../x", "/etc/x", "a/../../b"] {
            assert!(got(&[item("a", path)], None).is_err(), "{path}");
        }
    }
}
