//! In which form the client wants an answer.

use super::error::ApiError;

/// The form of objects in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The objects themselves.
    Object,
    /// `meta.k8s.io/v1 Table`.
    Table,
    /// Metadata only.
    Partial,
}

/// Negotiated answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Accept {
    /// Form.
    pub form: Form,
    /// YAML instead of JSON.
    pub yaml: bool,
}

/// Chooses from an `Accept` header in its order.
pub(super) fn negotiate(header: Option<&str>) -> Result<Accept, ApiError> {
    let Some(header) = header.filter(|header| !header.trim().is_empty()) else {
        return Ok(Accept { form: Form::Object, yaml: false });
    };
    header.split(',').find_map(choice).ok_or_else(|| {
        ApiError::not_acceptable(
            "only the following media types are accepted: application/json, application/yaml",
        )
    })
}

fn choice(entry: &str) -> Option<Accept> {
    let mut parts = entry.split(';').map(str::trim);
    let yaml = match parts.next()? {
        "application/json" | "*/*" | "application/*" => false,
        "application/yaml" => true,
        _ => return None,
    };
    let mut form = Form::Object;
    for parameter in parts {
        match parameter.split_once('=') {
            Some(("as", "Table")) => form = Form::Table,
            Some(("as", "PartialObjectMetadata" | "PartialObjectMetadataList")) => {
                form = Form::Partial;
            }
            Some(("as", _)) => return None,
            Some(("v", version)) if version != "v1" => return None,
            _ => {}
        }
    }
    Some(Accept { form, yaml })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        assert_eq!(negotiate(Some(table)).unwrap().form, Form::Table);
        let beta = "application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(negotiate(Some(beta)).unwrap().form, Form::Object);
        let protobuf = "application/vnd.kubernetes.protobuf,application/json";
        assert_eq!(negotiate(Some(protobuf)).unwrap().form, Form::Object);
        assert!(negotiate(Some("application/cbor")).is_err());
    }
}
