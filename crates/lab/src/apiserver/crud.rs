//! Create, get, replace, patch and delete, for every kind alike.

use std::sync::Arc;

use serde_json::{Value, json};

use super::error::{ApiError, Cause};
use super::http::Call;
use super::meta::{has_finalizers, is_deleting, metadata, now, text};
use super::negotiate::Form;
use super::registry::Resource;
use super::reply::{self, Reply};
use super::store::{Key, Transaction};
use super::{CRDS, body, crd, defaults, events, fields, meta, patch, services, table, validate};

/// What to do with fields that the schema does not know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

impl Call {
    fn name(&self) -> &str {
        self.target.name.as_deref().unwrap_or("")
    }

    pub(super) fn namespace(&self) -> &str {
        self.target.namespace.as_deref().unwrap_or("")
    }

    pub(super) fn key(&self) -> Key {
        Key {
            resource: self.resource.storage.clone(),
            namespace: self.namespace().to_owned(),
            name: self.name().to_owned(),
        }
    }

    pub(super) fn not_found(&self) -> ApiError {
        ApiError::not_found(&self.resource.group, &self.resource.plural, self.name())
    }

    pub(super) fn subresource(&self) -> &str {
        self.target.subresource.as_deref().unwrap_or("")
    }

    /// Who is said to have written: the given manager, or the client's program name.
    pub(super) fn manager(&self) -> String {
        match self.query.get("fieldManager") {
            Some(manager) => manager.to_owned(),
            None => self.agent.split(['/', ' ']).next().unwrap_or("").to_owned(),
        }
    }

    fn field_validation(&self) -> Result<FieldValidation, ApiError> {
        match self.query.get("fieldValidation") {
            None | Some("Warn") => Ok(FieldValidation::Warn),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some(other) => Err(ApiError::bad_request(format!(
                "query parameter \"fieldValidation\": {other:?} is not Ignore, Warn or Strict"
            ))),
        }
    }

    /// Answers with one object in the form that the client wants.
    pub(super) fn answer(&self, code: u16, object: &Value, warnings: &[String]) -> Reply {
        let served = serve_object(&self.resource, object);
        let value = match self.accept.form {
            Form::Object => served,
            Form::Partial => table::partial(&served),
            Form::Table => table::of(
                &self.resource,
                &[&served],
                json!({"resourceVersion": text(&served, "resourceVersion")}),
                self.query.get("includeObject"),
            ),
        };
        reply::warn(reply::object(code, &value, self.accept.yaml), warnings)
    }
}

/// The object in the requested version's shape.
pub(super) fn serve_object(resource: &Resource, object: &Value) -> Value {
    let mut served = object.clone();
    events::to_served(resource, &mut served);
    served
}

pub(super) fn get(call: &Call) -> Result<Reply, ApiError> {
    let object = call.api.store.get(&call.key()).ok_or_else(|| call.not_found())?;
    Ok(call.answer(200, &object, &[]))
}

/// Reads an object from the body: its kind must fit, unknown fields are refused, reported or
/// dropped as the client asks.
fn incoming(call: &Call, decoded: body::Decoded) -> Result<(Value, Vec<String>), ApiError> {
    let resource = &call.resource;
    let mut value = decoded.value;
    if !value.is_object() {
        return Err(ApiError::bad_request("the body must be an object"));
    }
    let expected = (resource.api_version(), resource.kind.as_str());
    let given = (value["apiVersion"].as_str(), value["kind"].as_str());
    if given.0.is_some_and(|version| version != expected.0)
        || given.1.is_some_and(|kind| kind != expected.1)
    {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({}, Kind={}) does not match the expected API version \
             ({}, Kind={})",
            given.0.unwrap_or(""),
            given.1.unwrap_or(""),
            expected.0,
            expected.1,
        )));
    }
    value["apiVersion"] = expected.0.into();
    value["kind"] = expected.1.into();
    let warnings = clean(call, &mut value, &decoded.duplicates)?;
    Ok((value, warnings))
}

/// Removes unknown fields, and checks types (of custom resources, validation does that).
fn clean(call: &Call, value: &mut Value, duplicates: &[String]) -> Result<Vec<String>, ApiError> {
    let resource = &call.resource;
    let schema = resource.schema();
    let mut problems: Vec<String> = fields::prune(value, schema)
        .into_iter()
        .map(|path| format!("unknown field {path:?}"))
        .collect();
    problems.extend(duplicates.iter().map(|path| format!("duplicate field {path:?}")));
    let cannot = |why: String| {
        ApiError::bad_request(format!(
            "{kind} in version {version:?} cannot be handled as a {kind}: {why}",
            kind = resource.kind,
            version = resource.version,
        ))
    };
    let validation = call.field_validation()?;
    if validation == FieldValidation::Strict && !problems.is_empty() {
        return Err(cannot(format!("strict decoding error: {}", problems.join(", "))));
    }
    if resource.custom.is_none() {
        fields::drop_nulls(value, schema);
        if let Some((found, path, wanted)) = fields::mistyped(value, schema) {
            return Err(cannot(format!(
                "json: cannot unmarshal {found} into Go struct field {}.{path} of type {wanted}",
                resource.kind,
            )));
        }
    }
    Ok(if validation == FieldValidation::Ignore { Vec::new() } else { problems })
}

pub(super) fn create(call: &Call) -> Result<Reply, ApiError> {
    let (mut value, mut warnings) = incoming(call, body::decode(&call.content_type, &call.body)?)?;
    if let Some(text) = call.resource.custom.as_ref().and_then(|c| c.deprecation.clone()) {
        warnings.push(text);
    }
    warnings.extend(services::beyond_the_lab(&call.resource, &value));
    let dry_run = call.query.dry_run()?;
    place(call, &mut value)?;
    let created = call
        .api
        .store
        .transact(|transaction| insert(call, transaction, value, dry_run, "Update"))?;
    after_write(call);
    Ok(call.answer(201, &created, &warnings))
}

/// Sets the namespace of the path and a name made from `generateName`.
fn place(call: &Call, value: &mut Value) -> Result<(), ApiError> {
    let namespace = call.namespace();
    let given = text(value, "namespace").to_owned();
    if call.resource.namespaced {
        if !given.is_empty() && given != namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the \
                 request",
            ));
        }
        metadata(value).insert("namespace".into(), namespace.into());
    } else {
        metadata(value).remove("namespace");
    }
    let prefix = text(value, "generateName").to_owned();
    if text(value, "name").is_empty() && !prefix.is_empty() {
        let kept: String = prefix.chars().take(58).collect();
        metadata(value).insert("name".into(), format!("{kept}{}", meta::suffix()?).into());
    }
    Ok(())
}

/// Stores a new object.
fn insert(
    call: &Call,
    transaction: &mut Transaction<'_>,
    mut value: Value,
    dry_run: bool,
    operation: &str,
) -> Result<Arc<Value>, ApiError> {
    let resource = &call.resource;
    let name = text(&value, "name").to_owned();
    let key = Key { name: name.clone(), ..call.key() };
    check_namespace(call, transaction, &name)?;
    if transaction.get(&key).is_some() {
        return Err(ApiError::already_exists(&resource.group, &resource.plural, &name));
    }
    let uid = meta::uid()?;
    let fields = metadata(&mut value);
    for field in ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"]
    {
        fields.remove(field);
    }
    if operation != "Apply" {
        fields.remove("managedFields");
    }
    fields.insert("uid".into(), uid.into());
    fields.insert("creationTimestamp".into(), now().into());
    fields.remove("generation");
    if resource.generation {
        fields.insert("generation".into(), 1.into());
    }
    initial_status(resource, &mut value);
    default(resource, &mut value);
    services::allocate(resource, transaction, None, &mut value)?;
    validate::check(resource, &value, None)?;
    if operation == "Update" {
        patch::managed::record(resource, None, &mut value, &call.manager(), "");
    }
    events::to_stored(resource, &mut value);
    Ok(if dry_run { Arc::new(value) } else { transaction.put(key, value) })
}

fn check_namespace(call: &Call, transaction: &Transaction<'_>, name: &str) -> Result<(), ApiError> {
    if !call.resource.namespaced {
        return Ok(());
    }
    let namespace = call.namespace();
    match transaction.get(&Key::new("/namespaces", "", namespace)) {
        None => Err(ApiError::not_found("", "namespaces", namespace)),
        Some(found) if is_deleting(&found) => Err(ApiError::forbidden(
            &call.resource.group,
            &call.resource.plural,
            name,
            &format!(
                "unable to create new content in namespace {namespace} because it is being \
                 terminated"
            ),
        )),
        Some(_) => Ok(()),
    }
}

/// Status belongs to controllers: a new object begins with none.
fn initial_status(resource: &Resource, value: &mut Value) {
    if !resource.has("status") || resource.builtin_key() == "/nodes" {
        return;
    }
    let status = match resource.builtin_key() {
        "/pods" => json!({"phase": "Pending", "qosClass": qos_class(&value["spec"])}),
        "/namespaces" => json!({"phase": "Active"}),
        "/services" => json!({"loadBalancer": {}}),
        "apps/replicasets" | "apps/statefulsets" => json!({"replicas": 0}),
        "apps/deployments" => json!({}),
        "apps/daemonsets" => json!({"currentNumberScheduled": 0, "desiredNumberScheduled": 0,
                                    "numberMisscheduled": 0, "numberReady": 0}),
        CRDS => {
            value["status"] = Value::Null;
            return;
        }
        _ => {
            value.as_object_mut().map(|fields| fields.remove("status"));
            return;
        }
    };
    value["status"] = status;
    if resource.builtin_key() == "/namespaces" {
        value["spec"]["finalizers"] = json!(["kubernetes"]);
    }
}

fn qos_class(spec: &Value) -> &'static str {
    let containers = spec["containers"].as_array().map_or(&[][..], Vec::as_slice);
    let has = |kind: &str, resource: &str| {
        containers.iter().all(|container| !container["resources"][kind][resource].is_null())
    };
    let any = containers.iter().any(|container| {
        ["limits", "requests"].iter().any(|kind| {
            container["resources"][kind].as_object().is_some_and(|list| !list.is_empty())
        })
    });
    let equal = containers.iter().all(|container| {
        let resources = &container["resources"];
        resources["requests"].is_null() || resources["requests"] == resources["limits"]
    });
    match (any, has("limits", "cpu") && has("limits", "memory") && equal) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn default(resource: &Resource, value: &mut Value) {
    match resource.custom {
        Some(_) => fields::default(value, resource.schema()),
        None => defaults::apply(resource.builtin_key(), value),
    }
    if resource.builtin_key() == CRDS {
        value["status"] = match &value["status"] {
            Value::Null => crd::status(value),
            status => json!({
                "acceptedNames": value["spec"]["names"],
                "conditions": status["conditions"],
                "storedVersions": status["storedVersions"],
            }),
        };
    }
}

pub(super) fn replace(call: &Call) -> Result<Reply, ApiError> {
    let (mut value, warnings) = incoming(call, body::decode(&call.content_type, &call.body)?)?;
    let dry_run = call.query.dry_run()?;
    let name = call.name();
    if text(&value, "name").is_empty() {
        metadata(&mut value).insert("name".into(), name.into());
    }
    let stored = call.api.store.transact(|transaction| {
        let old = transaction.get(&call.key()).ok_or_else(|| call.not_found())?;
        update(call, transaction, &old, value, dry_run, "Update")
    })?;
    after_write(call);
    Ok(call.answer(200, &stored, &warnings))
}

pub(super) fn patch(call: &Call) -> Result<Reply, ApiError> {
    let dry_run = call.query.dry_run()?;
    let kind = patch::Kind::of(&call.content_type, &call.resource)?;
    let mut warnings = Vec::new();
    let (code, stored) = call.api.store.transact(|transaction| {
        let old = transaction.get(&call.key());
        let served = old.as_ref().map(|old| serve_object(&call.resource, old));
        if kind == patch::Kind::Apply {
            let decoded = body::yaml(&call.body)?;
            let (applied, found) = incoming(call, decoded)?;
            warnings = found;
            return apply(call, transaction, old.as_deref(), served, applied, dry_run);
        }
        let (Some(old), Some(served)) = (old, served) else { return Err(call.not_found()) };
        let mut value = patch::apply_to(&call.resource, kind, &served, &call.body)?;
        // A patch may say nothing of the revision, or must name the present one.
        if text(&value, "resourceVersion").is_empty() {
            metadata(&mut value)
                .insert("resourceVersion".into(), served["metadata"]["resourceVersion"].clone());
        }
        warnings = clean(call, &mut value, &[])?;
        Ok((200, update(call, transaction, &old, value, dry_run, "Update")?))
    })?;
    after_write(call);
    Ok(call.answer(code, &stored, &warnings))
}

/// Server-side apply.
fn apply(
    call: &Call,
    transaction: &mut Transaction<'_>,
    old: Option<&Value>,
    served: Option<Value>,
    mut applied: Value,
    dry_run: bool,
) -> Result<(u16, Arc<Value>), ApiError> {
    let manager = call.query.get("fieldManager").ok_or_else(|| {
        ApiError::bad_request(
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required \
             for apply patch",
        )
    })?;
    if applied["metadata"]["managedFields"].is_array() {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    if text(&applied, "name").is_empty() {
        metadata(&mut applied).insert("name".into(), call.name().into());
    }
    if call.resource.namespaced {
        metadata(&mut applied).insert("namespace".into(), call.namespace().into());
    }
    let force = call.query.flag("force");
    let subresource = call.subresource();
    let value = patch::apply::apply(
        &call.resource,
        served.as_ref(),
        &applied,
        manager,
        force,
        subresource,
    )?;
    match old {
        Some(old) => Ok((200, update(call, transaction, old, value, dry_run, "Apply")?)),
        None if !subresource.is_empty() => Err(call.not_found()),
        None if !text(&applied, "uid").is_empty() => Err(call.not_found()),
        None if text(&applied, "name") != call.name() => Err(renamed(call, &applied)),
        None => Ok((201, insert(call, transaction, value, dry_run, "Apply")?)),
    }
}

/// Stores a changed object (in the served shape): checks the revision, keeps what the writer may
/// not change, fills in defaults, validates, and ends a deletion that nothing holds up any more.
pub(super) fn update(
    call: &Call,
    transaction: &mut Transaction<'_>,
    stored: &Value,
    mut value: Value,
    dry_run: bool,
    operation: &str,
) -> Result<Arc<Value>, ApiError> {
    let resource = &call.resource;
    let old = serve_object(resource, stored);
    if text(&value, "name") != call.name() {
        return Err(renamed(call, &value));
    }
    let given = text(&value, "resourceVersion");
    if given.is_empty() && resource.custom.is_some() && operation == "Update" {
        let hint = "must be specified for an update";
        let cause = Cause::invalid("metadata.resourceVersion", &json!(0), hint);
        return Err(ApiError::invalid(&resource.group, &resource.kind, call.name(), vec![cause]));
    }
    if !given.is_empty() && given != text(&old, "resourceVersion") {
        return Err(ApiError::modified(&resource.group, &resource.plural, call.name()));
    }
    let uid = text(&value, "uid");
    if !uid.is_empty() && uid != text(&old, "uid") {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(&old, "uid")
        );
        return Err(ApiError::conflict(&resource.group, &resource.plural, call.name(), &why));
    }
    keep(call, &old, &mut value);
    default(resource, &mut value);
    services::allocate(resource, transaction, Some(&old), &mut value)?;
    count_generation(resource, &old, &mut value);
    validate::check(resource, &value, Some(&old))?;
    if operation == "Update" {
        patch::managed::record(
            resource,
            Some(&old),
            &mut value,
            &call.manager(),
            call.subresource(),
        );
    }
    if patch::managed::same_but_for_times(&old, &value) {
        return Ok(Arc::new(stored.clone()));
    }
    events::to_stored(resource, &mut value);
    if dry_run {
        return Ok(Arc::new(value));
    }
    if is_deleting(&value) && may_go(resource, &value) {
        return Ok(transaction.delete(call.key(), value));
    }
    Ok(transaction.put(call.key(), value))
}

fn renamed(call: &Call, value: &Value) -> ApiError {
    ApiError::bad_request(format!(
        "the name of the object ({}) does not match the name on the URL ({})",
        text(value, "name"),
        call.name(),
    ))
}

/// Nothing holds up the deletion.
fn may_go(resource: &Resource, value: &Value) -> bool {
    let spec_finalizers = resource.builtin_key() == "/namespaces"
        && value["spec"]["finalizers"].as_array().is_some_and(|list| !list.is_empty());
    let grace = value["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
    !has_finalizers(value) && !spec_finalizers && grace == 0
}

/// Restores what this way of writing may not change.
fn keep(call: &Call, old: &Value, value: &mut Value) {
    let subresource = call.subresource();
    let mut kept = vec![
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "namespace",
        "selfLink",
        "generateName",
    ];
    if subresource == "status" && call.resource.custom.is_none() {
        kept.extend(["ownerReferences", "finalizers"]);
    }
    let before = &old["metadata"];
    let after = metadata(value);
    for field in kept {
        match before.get(field) {
            Some(was) => drop(after.insert(field.to_owned(), was.clone())),
            None => drop(after.remove(field)),
        }
    }
    if !after.contains_key("managedFields")
        && let Some(managed) = before.get("managedFields")
    {
        after.insert("managedFields".into(), managed.clone());
    }
    let Some(fields) = value.as_object_mut() else { return };
    match subresource {
        "status" => {
            let written = fields.remove("status");
            let metadata = fields.remove("metadata");
            *fields = old.as_object().cloned().unwrap_or_default();
            let metadata = if call.resource.custom.is_some() {
                // Only ownership of fields is written along with a custom resource's status.
                let mut kept = before.clone();
                if let Some(managed) = metadata.and_then(|m| m.get("managedFields").cloned()) {
                    kept["managedFields"] = managed;
                }
                Some(kept)
            } else {
                metadata
            };
            fields.remove("status");
            fields.extend(written.map(|status| ("status".to_owned(), status)));
            fields.extend(metadata.map(|metadata| ("metadata".to_owned(), metadata)));
        }
        "finalize" => {}
        _ if call.resource.has("status") => {
            fields.remove("status");
            fields.extend(old.get("status").map(|was| ("status".to_owned(), was.clone())));
            if call.resource.builtin_key() == "/namespaces"
                && let Some(spec) = old.get("spec")
            {
                fields.insert("spec".into(), spec.clone());
            }
        }
        _ => {}
    }
}

/// The generation goes up when anything but metadata and status changes.
fn count_generation(resource: &Resource, old: &Value, value: &mut Value) {
    if !resource.generation {
        return;
    }
    let essence = |object: &Value| {
        let mut fields = object.as_object().cloned().unwrap_or_default();
        fields.remove("metadata");
        if resource.custom.is_none() || resource.has("status") {
            fields.remove("status");
        }
        fields
    };
    if essence(old) != essence(value) {
        let before = old["metadata"]["generation"].as_i64().unwrap_or(0);
        metadata(value).insert("generation".into(), (before + 1).into());
    }
}

/// A changed definition changes what is served.
pub(super) fn after_write(call: &Call) {
    if call.resource.builtin_key() == CRDS {
        call.api.reload_registry();
    }
}

/// How to delete.
struct DeleteOptions {
    grace: Option<i64>,
    propagation: Option<String>,
    uid: Option<String>,
    revision: Option<String>,
    dry_run: bool,
}

fn delete_options(call: &Call) -> Result<DeleteOptions, ApiError> {
    let options = if call.body.is_empty() {
        Value::Null
    } else {
        body::decode(&call.content_type, &call.body)?.value
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let orphan = options["orphanDependents"]
        .as_bool()
        .map(|orphan| if orphan { "Orphan".to_owned() } else { "Background".to_owned() });
    let propagation = text(&options["propagationPolicy"])
        .or_else(|| call.query.get("propagationPolicy").map(str::to_owned))
        .or(orphan);
    if let Some(policy) = &propagation
        && !matches!(policy.as_str(), "Background" | "Foreground" | "Orphan")
    {
        return Err(ApiError::bad_request(format!(
            "propagationPolicy: {policy:?} is not Background, Foreground or Orphan"
        )));
    }
    let asked = call.query.number("gracePeriodSeconds")?.and_then(|n| i64::try_from(n).ok());
    Ok(DeleteOptions {
        grace: options["gracePeriodSeconds"].as_i64().or(asked),
        propagation,
        uid: text(&options["preconditions"]["uid"]),
        revision: text(&options["preconditions"]["resourceVersion"]),
        dry_run: call.query.dry_run()? || options["dryRun"] == json!(["All"]),
    })
}

pub(super) fn delete(call: &Call) -> Result<Reply, ApiError> {
    let options = delete_options(call)?;
    let (gone, last) = call.api.store.transact(|transaction| {
        let old = transaction.get(&call.key()).ok_or_else(|| call.not_found())?;
        remove(call, transaction, call.key(), &old, &options)
    })?;
    after_write(call);
    if gone && call.resource.builtin_key() == CRDS {
        remove_all_of(call, &last);
    }
    let returns_object =
        matches!(call.resource.builtin_key(), "/pods" | "/services" | "/serviceaccounts");
    if !gone || returns_object {
        return Ok(call.answer(200, &last, &[]));
    }
    let mut details = json!({
        "name": call.name(), "kind": call.resource.plural, "uid": last["metadata"]["uid"],
    });
    if !call.resource.group.is_empty() {
        details["group"] = call.resource.group.clone().into();
    }
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                        "details": details});
    Ok(reply::object(200, &status, call.accept.yaml))
}

/// What every cluster has.
const LASTING_NAMESPACES: [&str; 3] = ["default", "kube-system", "kube-public"];

/// Deletes an object, or begins to. Returns whether it is gone, and its last state.
fn remove(
    call: &Call,
    transaction: &mut Transaction<'_>,
    key: Key,
    old: &Value,
    options: &DeleteOptions,
) -> Result<(bool, Arc<Value>), ApiError> {
    let resource = &call.resource;
    if resource.builtin_key() == "/namespaces" && LASTING_NAMESPACES.contains(&key.name.as_str()) {
        let why = "this namespace may not be deleted";
        return Err(ApiError::forbidden("", &resource.plural, &key.name, why));
    }
    for (wanted, field) in [(&options.uid, "uid"), (&options.revision, "resourceVersion")] {
        if let Some(wanted) = wanted
            && wanted != text(old, field)
        {
            let why = format!(
                "Precondition failed: {field} in precondition: {wanted}, {field} in object meta: {}",
                text(old, field)
            );
            return Err(ApiError::conflict(&resource.group, &resource.plural, &key.name, &why));
        }
    }
    let mut value = old.clone();
    let grace = grace(resource, old, options.grace);
    let shorter =
        value["metadata"]["deletionGracePeriodSeconds"].as_i64().is_none_or(|g| grace < g);
    if !is_deleting(&value) || shorter {
        let deadline = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(grace);
        let fields = metadata(&mut value);
        fields.insert("deletionTimestamp".into(), meta::timestamp(deadline).into());
        fields.insert("deletionGracePeriodSeconds".into(), grace.into());
        if resource.generation {
            let before = fields.get("generation").and_then(Value::as_i64).unwrap_or(0);
            fields.insert("generation".into(), (before + 1).into());
        }
    }
    let waits_for = match options.propagation.as_deref() {
        Some("Foreground") => Some("foregroundDeletion"),
        Some("Orphan") => Some("orphan"),
        _ => None,
    };
    if let Some(finalizer) = waits_for {
        let list = &mut value["metadata"]["finalizers"];
        if !list.is_array() {
            *list = json!([]);
        }
        if let Some(list) = list.as_array_mut()
            && !list.iter().any(|known| known == finalizer)
        {
            list.push(finalizer.into());
        }
    }
    if resource.builtin_key() == "/namespaces" {
        value["status"]["phase"] = "Terminating".into();
    }
    if options.dry_run {
        return Ok((false, Arc::new(value)));
    }
    if may_go(resource, &value) {
        return Ok((true, transaction.delete(key, value)));
    }
    if value == *old {
        return Ok((false, Arc::new(value)));
    }
    Ok((false, transaction.put(key, value)))
}

/// Seconds that a pod has to end; other kinds go at once.
fn grace(resource: &Resource, old: &Value, asked: Option<i64>) -> i64 {
    let scheduled = old["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    let ended = matches!(old["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if resource.builtin_key() != "/pods" || !scheduled || ended {
        return 0;
    }
    let own = old["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
    asked.unwrap_or(own).max(0)
}

/// The objects of a definition that is gone.
fn remove_all_of(call: &Call, definition: &Value) {
    for resource in crd::resources(definition).into_iter().take(1) {
        let objects = call.api.store.list(&resource.storage, None).objects;
        let removed = call.api.store.transact(|transaction| {
            for object in objects {
                let key = Key {
                    resource: resource.storage.clone(),
                    namespace: text(&object, "namespace").to_owned(),
                    name: text(&object, "name").to_owned(),
                };
                transaction.delete(key, (*object).clone());
            }
            Ok(())
        });
        if let Err(error) = removed {
            tracing::warn!(%error, kind = resource.kind, "cannot remove the objects of a definition");
        }
    }
}

pub(super) fn delete_collection(call: &Call) -> Result<Reply, ApiError> {
    let options = delete_options(call)?;
    let selector = super::list::selector(call)?;
    let removed = call.api.store.transact(|transaction| {
        let namespace = call.target.namespace.as_deref();
        let mut removed = Vec::new();
        for object in transaction.list(&call.resource.storage, namespace) {
            if !selector.matches(&object) {
                continue;
            }
            let key = Key {
                resource: call.resource.storage.clone(),
                namespace: text(&object, "namespace").to_owned(),
                name: text(&object, "name").to_owned(),
            };
            removed.push(remove(call, transaction, key, &object, &options)?.1);
        }
        Ok(removed)
    })?;
    after_write(call);
    let items: Vec<Value> =
        removed.iter().map(|object| serve_object(&call.resource, object)).collect();
    let list = json!({
        "kind": call.resource.list_kind, "apiVersion": call.resource.api_version(),
        "metadata": {"resourceVersion": call.api.store.revision().to_string()}, "items": items,
    });
    Ok(reply::object(200, &list, call.accept.yaml))
}

/// `pods/binding`: the scheduler's decision.
pub(super) fn bind(call: &Call) -> Result<Reply, ApiError> {
    let binding = body::decode(&call.content_type, &call.body)?.value;
    let Some(node) = binding["target"]["name"].as_str().filter(|name| !name.is_empty()) else {
        let cause = Cause::required("target.name", "");
        return Err(ApiError::invalid("", "Binding", call.name(), vec![cause]));
    };
    call.api.store.transact(|transaction| {
        let old = transaction.get(&call.key()).ok_or_else(|| call.not_found())?;
        if old["spec"]["nodeName"].as_str().is_some_and(|known| !known.is_empty()) {
            let why = format!(
                "pod {} is already assigned to node {}",
                call.name(),
                old["spec"]["nodeName"]
            );
            return Err(ApiError::conflict("", "pods/binding", call.name(), &why));
        }
        let mut value = (*old).clone();
        value["spec"]["nodeName"] = node.into();
        let scheduled = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
                               "lastTransitionTime": now()});
        let conditions = &mut value["status"]["conditions"];
        match conditions.as_array_mut() {
            Some(list) => {
                list.retain(|condition| condition["type"] != "PodScheduled");
                list.push(scheduled);
            }
            None => *conditions = json!([scheduled]),
        }
        transaction.put(call.key(), value);
        Ok(())
    })?;
    Ok(reply::object(201, &success(), false))
}

/// `pods/eviction`: there are no disruption budgets, so it is a deletion.
pub(super) fn evict(call: &Call) -> Result<Reply, ApiError> {
    let eviction = body::decode(&call.content_type, &call.body)?.value;
    let options = DeleteOptions {
        grace: eviction["deleteOptions"]["gracePeriodSeconds"].as_i64(),
        propagation: None,
        uid: eviction["deleteOptions"]["preconditions"]["uid"].as_str().map(str::to_owned),
        revision: None,
        dry_run: call.query.dry_run()?,
    };
    call.api.store.transact(|transaction| {
        let old = transaction.get(&call.key()).ok_or_else(|| call.not_found())?;
        remove(call, transaction, call.key(), &old, &options)
    })?;
    Ok(reply::object(201, &success(), false))
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}
