//! The schema of `CiliumNetworkPolicy` and `CiliumClusterwideNetworkPolicy`.

use serde_json::{Value, json};

use super::{about, age, column, list, object, opaque, string, string_map, strings, valid};

const ENTITIES: [&str; 11] = [
    "all",
    "world",
    "cluster",
    "host",
    "init",
    "ingress",
    "unmanaged",
    "remote-node",
    "health",
    "none",
    "kube-apiserver",
];

pub(super) fn columns() -> Value {
    json!([age(), column("Valid", ".status.conditions[?(@.type=='Valid')].status", "string")])
}

pub(super) fn schema() -> Value {
    let fields = json!({
        "spec": about("What the policy says.", rule()),
        "specs": about("What the policy says, in several parts, beside or instead of `spec`.", list(rule())),
        "status": about("What became of the policy; written by Palisade.", status()),
    });
    let some = ("has(self.spec) || has(self.specs)", "a policy needs `spec` or `specs`");
    about("Who may talk to whom.", valid(object(fields, &[]), &[some]))
}

fn selector() -> Value {
    json!({ "type": "object", "properties": {
        "matchLabels": { "type": "object", "additionalProperties": {
            "type": "string", "maxLength": 63,
        }},
        "matchExpressions": list(json!({
            "type": "object",
            "required": ["key", "operator"],
            "properties": {
                "key": string(),
                "operator": {
                    "type": "string", "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
                },
                "values": strings(),
            },
        })),
    }})
}

fn rule() -> Value {
    let one_subject = (
        "has(self.endpointSelector) != has(self.nodeSelector)",
        "write either `endpointSelector`, for pods (`{}` selects all), or `nodeSelector`",
    );
    let some_rule = (
        "has(self.ingress) || has(self.ingressDeny) || has(self.egress) || has(self.egressDeny)",
        "write one of `ingress`, `ingressDeny`, `egress` and `egressDeny`; an empty list denies all",
    );
    valid(structure_of_rule(), &[one_subject, some_rule])
}

fn structure_of_rule() -> Value {
    json!({
        "type": "object",
        "oneOf": [
            { "required": ["endpointSelector"] },
            { "required": ["nodeSelector"] },
        ],
        "properties": {
            "endpointSelector": about("The pods that the policy is for, by their labels.", selector()),
            "nodeSelector": about("The nodes that the policy is for, by their labels.", selector()),
            "ingress": about("Who may reach them; once this is given, nobody else may.", list(entry("from", true))),
            "ingressDeny": about("Who must not reach them, whatever else allows it.", list(entry("from", false))),
            "egress": about("Whom they may reach; once this is given, nobody else.", list(entry("to", true))),
            "egressDeny": about("Whom they must not reach, whatever else allows it.", list(entry("to", false))),
            "enableDefaultDeny": { "type": "object", "properties": {
                "ingress": { "type": "boolean" },
                "egress": { "type": "boolean" },
            }},
            "labels": list(json!({
                "type": "object",
                "required": ["key"],
                "properties": { "key": string(), "value": string(), "source": string() },
            })),
            "description": string(),
            "log": { "type": "object", "properties": {
                "value": { "type": "string", "maxLength": 32 },
            }},
        },
    })
}

/// A rule of one of the four lists.
fn entry(side: &str, allows: bool) -> Value {
    let mut fields = serde_json::Map::new();
    let mut add = |name: &str, schema: Value| fields.insert(format!("{side}{name}"), schema);
    add("Endpoints", list(selector()));
    add("Requires", json!({ "type": "array", "maxItems": 0, "items": selector() }));
    add("CIDR", list(json!({ "type": "string", "format": "cidr" })));
    add("CIDRSet", list(cidr_set()));
    add("Entities", list(json!({ "type": "string", "enum": ENTITIES })));
    add("Nodes", list(selector()));
    add(
        "Groups",
        list(json!({ "type": "object", "properties": { "aws": {
            "type": "object", "properties": {
                "labels": string_map(),
                "region": string(),
                "securityGroupsIds": strings(),
                "securityGroupsNames": strings(),
            },
        }}})),
    );
    if side == "to" {
        add("Services", list(service()));
        if allows {
            add("FQDNs", list(fqdn()));
        }
    }
    fields.insert("toPorts".into(), list(port_rule(allows)));
    fields.insert("icmps".into(), list(icmps()));
    if allows {
        fields.insert(
            "authentication".into(),
            json!({
                "type": "object",
                "required": ["mode"],
                "properties": { "mode": {
                    "type": "string", "enum": ["disabled", "required", "test-always-fail"],
                }},
            }),
        );
    }
    json!({ "type": "object", "properties": fields })
}

fn cidr_set() -> Value {
    json!({
        "type": "object",
        "oneOf": [
            { "required": ["cidr"] },
            { "required": ["cidrGroupRef"] },
            { "required": ["cidrGroupSelector"] },
        ],
        "properties": {
            "cidr": { "type": "string", "format": "cidr" },
            "cidrGroupRef": { "type": "string", "maxLength": 253 },
            "cidrGroupSelector": selector(),
            "except": list(json!({ "type": "string", "format": "cidr" })),
        },
    })
}

fn service() -> Value {
    json!({ "type": "object", "properties": {
        "k8sService": { "type": "object", "properties": {
            "serviceName": string(), "namespace": string(),
        }},
        "k8sServiceSelector": {
            "type": "object",
            "required": ["selector"],
            "properties": { "selector": selector(), "namespace": string() },
        },
    }})
}

fn fqdn() -> Value {
    json!({
        "type": "object",
        "oneOf": [{ "required": ["matchName"] }, { "required": ["matchPattern"] }],
        "properties": {
            "matchName": {
                "type": "string", "maxLength": 255, "pattern": r"^([-a-zA-Z0-9_]+[.]?)+$",
            },
            "matchPattern": {
                "type": "string", "maxLength": 255, "pattern": r"^([-a-zA-Z0-9_*]+[.]?)+$",
            },
        },
    })
}

fn port_rule(allows: bool) -> Value {
    let ports = json!({ "type": "array", "maxItems": 40, "items": {
        "type": "object",
        "properties": {
            "port": {
                "type": "string",
                "pattern": r"^(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[0-9]{1,4})|([a-zA-Z0-9]-?)*[a-zA-Z](-?[a-zA-Z0-9])*$",
            },
            "endPort": { "type": "integer", "format": "int32", "minimum": 0, "maximum": 65535 },
            "protocol": {
                "type": "string", "enum": ["TCP", "UDP", "SCTP", "VRRP", "IGMP", "ANY"],
            },
        },
    }});
    if !allows {
        return json!({ "type": "object", "properties": { "ports": ports } });
    }
    json!({ "type": "object", "properties": {
        "ports": ports,
        "rules": application_rules(),
        "terminatingTLS": tls(),
        "originatingTLS": tls(),
        "serverNames": {
            "type": "array",
            "minItems": 1,
            "x-kubernetes-list-type": "set",
            "items": {
                "type": "string",
                "maxLength": 255,
                "pattern": r"^(\*?\*\.)?([-a-zA-Z0-9_]+\.?)+$",
            },
        },
        "listener": {
            "type": "object",
            "required": ["envoyConfig", "name"],
            "properties": {
                "name": { "type": "string", "minLength": 1 },
                "priority": { "type": "integer", "minimum": 1, "maximum": 100 },
                "envoyConfig": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "kind": {
                            "type": "string",
                            "enum": ["CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig"],
                        },
                        "name": { "type": "string", "minLength": 1 },
                    },
                },
            },
        },
    }})
}

fn tls() -> Value {
    json!({
        "type": "object",
        "required": ["secret"],
        "properties": {
            "secret": {
                "type": "object",
                "required": ["name"],
                "properties": { "name": string(), "namespace": string() },
            },
            "trustedCA": string(),
            "certificate": string(),
            "privateKey": string(),
        },
    })
}

fn application_rules() -> Value {
    let secret = json!({
        "type": "object",
        "required": ["name"],
        "properties": { "name": string(), "namespace": string() },
    });
    json!({
        "type": "object",
        "properties": {
            "http": list(json!({ "type": "object", "properties": {
                "path": string(),
                "method": string(),
                "host": string(),
                "headers": strings(),
                "headerMatches": list(json!({
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": { "type": "string", "minLength": 1 },
                        "value": string(),
                        "mismatch": { "type": "string", "enum": ["LOG", "ADD", "DELETE", "REPLACE"] },
                        "secret": secret,
                    },
                })),
            }})),
            "kafka": list(json!({ "type": "object", "properties": {
                "role": { "type": "string", "enum": ["produce", "consume"] },
                "apiKey": string(),
                "apiVersion": string(),
                "clientID": string(),
                "topic": { "type": "string", "maxLength": 255 },
            }})),
            "dns": list(fqdn()),
            "l7proto": string(),
            "l7": list(string_map()),
        },
    })
}

fn icmps() -> Value {
    json!({ "type": "object", "properties": { "fields": {
        "type": "array",
        "maxItems": 40,
        "items": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "family": { "type": "string", "enum": ["IPv4", "IPv6"], "default": "IPv4" },
                "type": {
                    "x-kubernetes-int-or-string": true,
                    "anyOf": [{ "type": "integer" }, { "type": "string" }],
                },
            },
        },
    }}})
}

fn status() -> Value {
    json!({ "type": "object", "properties": {
        "conditions": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
            "items": {
                "type": "object",
                "required": ["type", "status"],
                "properties": {
                    "type": string(),
                    "status": string(),
                    "reason": string(),
                    "message": string(),
                    "lastTransitionTime": { "type": "string", "format": "date-time" },
                    "observedGeneration": { "type": "integer", "format": "int64" },
                },
            },
        },
        "derivativePolicies": { "type": "object", "additionalProperties": opaque() },
    }})
}
