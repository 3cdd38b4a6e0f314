//! What image names stand for in a lab.

/// The commands that an image brings along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    entrypoint: Vec<String>,
    arguments: Vec<String>,
}

/// Waits to be told what to do.
const IDLE: [&str; 2] = ["sleep", "infinity"];

/// Told to people who name an image that the lab does not have.
const KNOWN: &str = "docker.io/cilium/starwars, docker.io/tgraf/netperf, docker.io/curlimages/curl, \
quay.io/cilium/alpine-curl, docker.io/library/busybox, quay.io/cilium/json-mock, \
registry.k8s.io/e2e-test-images/agnhost, registry.k8s.io/pause";

/// The cluster's own DNS.
pub const DNS_IMAGE: &str = "palisade.local/lab/dns";

impl Image {
    fn new(entrypoint: &[&str], arguments: &[&str]) -> Self {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Self { entrypoint: owned(entrypoint), arguments: owned(arguments) }
    }

    /// An image without a task of its own.
    fn idle() -> Self {
        Self::new(&[], &IDLE)
    }

    /// The command line of a container: `command` replaces everything, `args` the arguments. Who
    /// wants to type (`kubectl run -it`) gets a shell where there is no other task.
    pub(super) fn argv(&self, command: &[String], args: &[String], stdin: bool) -> Vec<String> {
        if !command.is_empty() {
            return [command, args].concat();
        }
        if args.is_empty() && stdin && self.arguments == IDLE {
            return vec!["sh".to_owned()];
        }
        if args.is_empty() {
            return [self.entrypoint.as_slice(), &self.arguments].concat();
        }
        [self.entrypoint.as_slice(), args].concat()
    }
}

/// Finds the image; the error says which ones there are.
pub(super) fn resolve(reference: &str) -> Result<Image, String> {
    let name = repository(reference);
    let (path, last) = name.rsplit_once('/').unwrap_or(("", &name));
    let lab = crate::container::LAB_IN_CONTAINER;
    let image = match (path, last) {
        ("palisade.local/lab", "dns") => Image::new(&[lab, "builtin", "dns"], &[]),
        (_, "starwars") => Image::new(&[lab, "builtin", "deathstar"], &[]),
        (_, "agnhost") => Image::new(&["/agnhost"], &["pause"]),
        (_, "pause") => Image::new(&["/pause"], &[]),
        (_, "json-mock") => {
            Image::new(&["/agnhost"], &["netexec", "--http-port=8080", "--udp-port=8081"])
        }
        (_, "netperf" | "alpine-curl" | "busybox" | "curl" | "alpine" | "netshoot" | "debian") => {
            Image::idle()
        }
        _ => {
            return Err(format!(
                "the lab pulls nothing from registries, and it has no image {reference:?} built \
                 in; use one of: {KNOWN}"
            ));
        }
    };
    Ok(image)
}

/// The reference without tag and digest, with registry and library written out.
fn repository(reference: &str) -> String {
    let name = reference.split('@').next().unwrap_or(reference);
    let name = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    };
    match name.split_once('/') {
        None => format!("docker.io/library/{name}"),
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        assert_eq!(repository("busybox"), "docker.io/library/busybox");
        assert_eq!(repository("cilium/starwars:v1"), "docker.io/cilium/starwars");
        assert_eq!(repository("registry.k8s.io/pause:3.10"), "registry.k8s.io/pause");
        assert_eq!(repository("localhost:5000/x@sha256:00"), "localhost:5000/x");
    }

    #[test]
    fn commands() {
        let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let agnhost = resolve("registry.k8s.io/e2e-test-images/agnhost:2.47").unwrap();
        assert_eq!(agnhost.argv(&[], &[], false), ["/agnhost", "pause"]);
        assert_eq!(agnhost.argv(&[], &owned(&["porter"]), true), ["/agnhost", "porter"]);
        assert_eq!(agnhost.argv(&owned(&["sh", "-c"]), &owned(&["x"]), true), ["sh", "-c", "x"]);
        let busybox = resolve("busybox").unwrap();
        assert_eq!(busybox.argv(&[], &[], false), ["sleep", "infinity"]);
        assert_eq!(busybox.argv(&[], &[], true), ["sh"]);
        assert!(resolve("nginx").unwrap_err().contains("docker.io/cilium/starwars"));
    }
}
