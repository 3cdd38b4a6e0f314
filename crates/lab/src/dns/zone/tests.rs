use super::*;
use serde_json::json;

fn zone() -> Zone {
    let services: Vec<Service> = serde_json::from_value(json!([
        {"metadata": {"name": "deathstar", "namespace": "default"},
         "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd96::7"],
                  "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}},
        {"metadata": {"name": "db", "namespace": "default"},
         "spec": {"clusterIP": "None", "clusterIPs": ["None"],
                  "ports": [{"name": "sql", "port": 5432}]}},
        {"metadata": {"name": "out", "namespace": "default"},
         "spec": {"type": "ExternalName", "externalName": "example.com"}},
        {"metadata": {"name": "alias", "namespace": "default"},
         "spec": {"type": "ExternalName", "externalName": "deathstar.default.svc.cluster.local"}}
    ]))
    .unwrap();
    let slices: Vec<EndpointSlice> = serde_json::from_value(json!([
        {"metadata": {"name": "db-1", "namespace": "default",
                      "labels": {"kubernetes.io/service-name": "db"}},
         "addressType": "IPv4",
         "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
         "endpoints": [
            {"addresses": ["10.244.1.5"], "hostname": "db-0", "conditions": {"ready": true}},
            {"addresses": ["10.244.1.6"], "conditions": {"ready": true}},
            {"addresses": ["10.244.1.7"], "conditions": {"ready": false}}]}
    ]))
    .unwrap();
    Zone::build(&services, &slices, 3)
}

fn ask(name: &str, kind: u16) -> (u8, Vec<String>, usize) {
    let answer = zone().answer(&Query::new(1, Name::parse(name).unwrap(), kind));
    let records = answer.answers.iter().map(|record| record.data.to_string()).collect();
    (answer.code, records, answer.authority.len())
}

fn found(name: &str, kind: u16) -> Vec<String> {
    let (code, records, authority) = ask(name, kind);
    assert_eq!((code, authority), (number::NO_ERROR, 0), "{name}");
    records
}

#[test]
fn cluster_ips_of_both_families_in_any_case() {
    assert_eq!(found("DeathStar.Default.svc.cluster.LOCAL", number::A), ["10.96.0.7"]);
    assert_eq!(found("deathstar.default.svc.cluster.local", number::AAAA), ["fd96::7"]);
    assert_eq!(
        found("_http._tcp.deathstar.default.svc.cluster.local", number::SRV),
        ["0 100 80 deathstar.default.svc.cluster.local."]
    );
}

#[test]
fn headless_services_name_their_ready_pods() {
    let name = "db.default.svc.cluster.local";
    assert_eq!(found(name, number::A), ["10.244.1.5", "10.244.1.6"]);
    assert_eq!(found(&format!("db-0.{name}"), number::A), ["10.244.1.5"]);
    assert_eq!(found(&format!("10-244-1-6.{name}"), number::A), ["10.244.1.6"]);
    assert_eq!(found(&format!("_sql._tcp.{name}"), number::SRV).len(), 2);
}

#[test]
fn pointers() {
    assert_eq!(
        found("7.0.96.10.in-addr.arpa", number::PTR),
        ["deathstar.default.svc.cluster.local."]
    );
    assert_eq!(
        found(&reverse("fd96::7".parse().unwrap()), number::PTR),
        ["deathstar.default.svc.cluster.local."]
    );
    assert_eq!(
        found("5.1.244.10.in-addr.arpa", number::PTR),
        ["db-0.db.default.svc.cluster.local."]
    );
    assert_eq!(ask("9.0.96.10.in-addr.arpa", number::PTR).0, number::NAME_ERROR);
}

#[test]
fn aliases() {
    assert_eq!(found("out.default.svc.cluster.local", number::A), ["example.com."]);
    assert_eq!(
        found("alias.default.svc.cluster.local", number::A),
        ["deathstar.default.svc.cluster.local.", "10.96.0.7"]
    );
}

#[test]
fn pods_by_address() {
    assert_eq!(found("10-244-1-5.default.pod.cluster.local", number::A), ["10.244.1.5"]);
    assert_eq!(ask("10-244-1-5.nowhere.pod.cluster.local", number::A).0, number::NAME_ERROR);
    assert_eq!(ask("x.default.pod.cluster.local", number::A).0, number::NAME_ERROR);
}

#[test]
fn no_data_and_no_name_differ_and_carry_the_soa() {
    let name = "db.default.svc.cluster.local";
    assert_eq!(ask(name, number::AAAA), (number::NO_ERROR, vec![], 1));
    assert_eq!(ask("default.svc.cluster.local", number::A), (number::NO_ERROR, vec![], 1));
    assert_eq!(ask(&format!("no.{name}"), number::A), (number::NAME_ERROR, vec![], 1));
    let doubled = "deathstar.default.svc.cluster.local.default.svc.cluster.local";
    assert_eq!(ask(doubled, number::A), (number::NAME_ERROR, vec![], 1));
}

#[test]
fn other_zones_are_refused() {
    assert_eq!(ask("example.com", number::A).0, number::REFUSED);
    assert_eq!(ask("notcluster.local", number::A).0, number::REFUSED);
    assert_eq!(found("cluster.local", number::SOA).len(), 1);
}
