//! `palisade install`, `upgrade`, `uninstall` and `config`: the chart's objects, applied by the
//! API server.

pub(crate) mod apply;
mod record;
mod remove;
mod rollout;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Namespace, Node},
    rbac::v1::ClusterRoleBinding,
};
use kube::{Api, Client, ResourceExt, api::ListParams};
use palisade_api::pool::taken;
use serde_json::{Map, Value, json};

use self::record::Record;
use crate::{
    chart::{self, Chart},
    cli::{self, Global, duration},
    cluster,
    exit::{Exit, Failure},
    output::{self, Format, note, say},
};

pub(crate) use remove::{UninstallArgs, uninstall};

/// Which namespace, as every command here takes it.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Namespace of Palisade's pods.
    #[arg(
        short,
        long,
        default_value = "kube-system",
        value_name = "NAMESPACE",
        value_parser = cli::namespace
    )]
    pub(crate) namespace: String,
}

#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    place: Place,
    /// A value of the chart; may be given more than once, and as a list with commas.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// File with values of the chart; may be given more than once.
    #[arg(short = 'f', long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Print the objects, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    patience: Patience,
}

#[derive(Debug, Args)]
pub(crate) struct Patience {
    /// Wait until everything runs.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most, such as 90s or 5m.
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = duration)]
    wait_duration: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// The values in force: what was chosen, over what the chart says.
    #[command(after_help = "Examples:\n  palisade config view\n  palisade config view -o json")]
    View {
        #[command(flatten)]
        place: Place,
    },
    /// Change settings; pods that use them are replaced, some at a time.
    #[command(
        after_help = "Examples:\n  palisade config set log-level=debug\n  palisade config set ipam=cluster-pool pool-ipv4=10.244.0.0/16"
    )]
    Set {
        /// Keys of `config` in the chart's values, with or without `config.` before them.
        #[arg(required = true, value_name = "KEY=VALUE")]
        settings: Vec<String>,
        #[command(flatten)]
        place: Place,
        /// Print the objects, and change nothing.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        patience: Patience,
    },
}

const WITHOUT_JSON: &str = "Leave -o json away, or add --dry-run, which prints the objects; then ask: palisade status -o json";

/// For the first time.
pub(crate) fn install(global: &Global, args: &InstallArgs) -> Result<Exit> {
    let chosen = chosen(args)?;
    let chart = Chart::new(&chosen, &args.place.namespace)?;
    if args.dry_run {
        return dry_run(global, &chart);
    }
    output::for_people_only(global.output, WITHOUT_JSON)?;
    cluster::on_runtime(None, async {
        let client = cluster::client(global).await?;
        if Record::read(&client, &args.place.namespace).await?.is_some() {
            return Err(Failure::refused(
                format!("Palisade is installed in the namespace {}", args.place.namespace),
                "Change it with:  palisade upgrade, or palisade config set",
            )
            .into());
        }
        check_helm(&client).await?;
        check_other_installations(&client, &args.place.namespace).await?;
        check_namespace(&client, &args.place.namespace).await?;
        check_other_networks(&client, &chart).await?;
        check_pools(&client, &chart).await?;
        roll_out(&client, &chart, &chosen, Record::default(), args).await
    })
}

/// With what was chosen before, and more.
pub(crate) fn upgrade(global: &Global, args: &InstallArgs) -> Result<Exit> {
    let more = chosen(args)?;
    change(global, args, more)
}

fn change(global: &Global, args: &InstallArgs, more: Value) -> Result<Exit> {
    if !args.dry_run {
        output::for_people_only(global.output, WITHOUT_JSON)?;
    }
    cluster::on_runtime(None, async {
        let client = cluster::client(global).await?;
        let record = Record::require(&client, &args.place.namespace).await?;
        let mut chosen = record.values.clone();
        chart::combine(&mut chosen, more);
        let chart = Chart::new(&chosen, &args.place.namespace)?;
        if args.dry_run {
            return dry_run(global, &chart);
        }
        check_other_installations(&client, &args.place.namespace).await?;
        // Those of before hold, whatever the cluster has got since.
        if changes_pools(&record.values, &chosen) {
            check_pools(&client, &chart).await?;
        }
        roll_out(&client, &chart, &chosen, record, args).await
    })
}

pub(crate) fn config(global: &Global, command: ConfigCommand) -> Result<Exit> {
    match command {
        ConfigCommand::View { place } => view(global, &place),
        ConfigCommand::Set { settings, place, dry_run, patience } => {
            let mut config = Map::new();
            for setting in &settings {
                config.extend(of_config(chart::parse_set(setting)?));
            }
            let (set, values) = (Vec::new(), Vec::new());
            let args = InstallArgs { place, set, values, dry_run, patience };
            change(global, &args, json!({ "config": config }))
        }
    }
}

fn view(global: &Global, place: &Place) -> Result<Exit> {
    let record = cluster::on_runtime(None, async {
        let client = cluster::client(global).await?;
        Record::require(&client, &place.namespace).await
    })?;
    let chart = Chart::of_record(&record.values, &place.namespace)?;
    match global.output {
        Format::Json => output::json(chart.values())?,
        Format::Table => say!("{}", serde_saphyr::to_string(chart.values())?.trim_end()),
    }
    Ok(Exit::Ok)
}

/// Settings, whether or not they have the name `config` in front.
fn of_config(settings: Value) -> Map<String, Value> {
    let mut config = Map::new();
    let Value::Object(settings) = settings else { return config };
    for (key, value) in settings {
        match value {
            Value::Object(inner) if key == "config" => config.extend(inner),
            value => config.extend([(key, value)]),
        }
    }
    config
}

fn chosen(args: &InstallArgs) -> Result<Value> {
    let mut chosen = json!({});
    for file in &args.values {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let values: Value =
            serde_saphyr::from_str(&text).with_context(|| file.display().to_string())?;
        match values {
            Value::Null => {}
            Value::Object(_) => chart::combine(&mut chosen, values),
            _ => bail!("{}: the values of a chart are a map", file.display()),
        }
    }
    for set in &args.set {
        chart::combine(&mut chosen, chart::parse_set(set)?);
    }
    Ok(chosen)
}

fn dry_run(global: &Global, chart: &Chart) -> Result<Exit> {
    let objects = chart.objects()?;
    match global.output {
        Format::Json => {
            output::json(&json!({ "apiVersion": "v1", "kind": "List", "items": objects }))?
        }
        Format::Table => {
            for object in objects {
                say!("---\n{}", serde_saphyr::to_string(&object)?.trim_end());
            }
        }
    }
    Ok(Exit::Ok)
}

async fn roll_out(
    client: &Client,
    chart: &Chart,
    chosen: &Value,
    mut record: Record,
    args: &InstallArgs,
) -> Result<Exit> {
    check_secrets_namespace(client, chart.secrets_namespace()).await?;
    let objects = chart.objects()?;
    let before = std::mem::take(&mut record.objects);
    // Written first, so that what is left of an attempt that broke off can be taken away.
    let after: Vec<record::Reference> = objects.iter().map(record::Reference::of).collect();
    let gone: Vec<_> = before.iter().filter(|it| !after.contains(it)).cloned().collect();
    remove::refuse_to_lose_secrets(client, &gone, "delete them there, and try again").await?;
    remove::end_cleaning(client, &args.place.namespace, args.patience.wait_duration).await?;
    record.values = chosen.clone();
    record.version = chart.version().to_owned();
    record.objects = after.iter().chain(&gone).cloned().collect();
    record.write(client, &args.place.namespace).await?;
    for object in &objects {
        apply::apply(client, object).await?;
    }
    for object in &gone {
        remove::delete(client, object).await?;
    }
    record.objects = after;
    record.write(client, &args.place.namespace).await?;
    if args.patience.wait {
        rollout::wait(client, &args.place.namespace, args.patience.wait_duration).await?;
    } else {
        note!("\nWatch it start with:  palisade status --wait");
    }
    Ok(Exit::Ok)
}

async fn check_namespace(client: &Client, namespace: &str) -> Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    if api.get_opt(namespace).await?.is_some() {
        return Ok(());
    }
    Err(Failure::missing(
        format!("there is no namespace {namespace}"),
        format!("Nothing was changed. Make it with:  kubectl create namespace {namespace}"),
    )
    .into())
}

/// What is made for Secrets is deleted one day, with all that is in it: it must be nobody else's.
async fn check_secrets_namespace(client: &Client, name: &str) -> Result<()> {
    const PART_OF: &str = "app.kubernetes.io/part-of";
    let found = Api::<Namespace>::all(client.clone()).get_opt(name).await?;
    if found.is_none_or(|it| it.labels().get(PART_OF).is_some_and(|whole| whole == "palisade")) {
        return Ok(());
    }
    Err(Failure::refused(
        format!("secrets.namespace: there is a namespace {name} already, which is not Palisade's"),
        format!(
            "Nothing was changed. Choose another one: it is deleted with Palisade. If nothing else\n\
             is in this one, give it away with:  kubectl label namespace {name} {PART_OF}=palisade"
        ),
    )
    .into())
}

/// What Helm installed is in its record only, and stays with it.
async fn check_helm(client: &Client) -> Result<()> {
    let api: Api<ClusterRoleBinding> = Api::all(client.clone());
    let Some(binding) = api.get_opt("palisade-operator").await? else { return Ok(()) };
    if binding.labels().get("app.kubernetes.io/managed-by").is_none_or(|by| by != "Helm") {
        return Ok(());
    }
    let note = |name: &str| {
        let notes = binding.annotations();
        notes.get(&format!("meta.helm.sh/{name}")).map_or("palisade", String::as_str)
    };
    let (release, namespace) = (note("release-name"), note("release-namespace"));
    Err(Failure::refused(
        format!("Helm installed Palisade: release {release} in the namespace {namespace}"),
        format!(
            "Nothing was changed. Go on with:  helm upgrade {release} -n {namespace}\n\
             or remove it first with:         helm uninstall {release} -n {namespace}"
        ),
    )
    .into())
}

/// The namespace of another installation, should there be one.
async fn other_installation(client: &Client, namespace: &str) -> Result<Option<String>> {
    // Only who administers the cluster binds roles; ConfigMaps are written by others, too.
    let api: Api<ClusterRoleBinding> = Api::all(client.clone());
    let binding = api.get_opt("palisade-operator").await?;
    let subjects = binding.and_then(|it| it.subjects).unwrap_or_default();
    Ok(subjects.into_iter().filter_map(|it| it.namespace).find(|it| it != namespace))
}

/// What is bound to the whole cluster can name the pods of one installation only: a second one
/// would take the first one's rights.
async fn check_other_installations(client: &Client, namespace: &str) -> Result<()> {
    let Some(other) = other_installation(client, namespace).await? else { return Ok(()) };
    Err(Failure::refused(
        format!("Palisade is installed in the namespace {other}, and a cluster has only one"),
        format!(
            "Nothing was changed. Change that one with:  palisade upgrade -n {other}\n\
             or remove it first with:                   palisade uninstall -n {other}"
        ),
    )
    .into())
}

fn changes_pools(before: &Value, after: &Value) -> bool {
    let names = ["ipam", "pool-ipv4", "pool-ipv4-mask", "pool-ipv6", "pool-ipv6-mask"];
    names.iter().any(|name| before["config"][name] != after["config"][name])
}

/// The operator would give less of them, but nobody might look at its log.
async fn check_pools(client: &Client, chart: &Chart) -> Result<()> {
    let Some(pools) = chart.pools() else { return Ok(()) };
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?.items;
    let checked = pools.check(&taken(client, &nodes).await?);
    checked.map_err(|fault| {
        let advice = "Nothing was changed. Pods need a network that nobody else has.";
        Failure::refused(format!("config.{fault}"), advice).into()
    })
}

/// Two networks cannot both have the pods; the one that is there is not touched unasked.
async fn check_other_networks(client: &Client, chart: &Chart) -> Result<()> {
    const KNOWN: [&str; 10] = [
        "antrea-agent",
        "aws-node",
        "calico-node",
        "canal",
        "cilium",
        "kindnet",
        "kube-flannel",
        "kube-flannel-ds",
        "kube-router",
        "weave-net",
    ];
    if chart.values()["cni"]["exclusive"] == true {
        return Ok(());
    }
    let all = Api::<DaemonSet>::all(client.clone()).list(&ListParams::default()).await?;
    let other = all.items.iter().find(|it| KNOWN.contains(&it.name_any().as_str()));
    let Some(other) = other else { return Ok(()) };
    Err(Failure::refused(
        format!(
            "this cluster has another network: DaemonSet {}/{}",
            other.namespace().unwrap_or_default(),
            other.name_any()
        ),
        "Nothing was changed. Remove it first, or let Palisade put its configuration aside with\n\
         --set cni.exclusive=true; docs/migrate.md says what happens to the pods then.",
    )
    .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_may_have_the_name_of_all_settings_before_it() {
        let set = |text: &str| Value::Object(of_config(chart::parse_set(text).unwrap()));
        let wanted = json!({ "ipam": "cluster-pool", "log-level": null });
        for text in [
            "ipam=cluster-pool,log-level=null",
            "config.ipam=cluster-pool,config.log-level=null",
            "config.ipam=cluster-pool,log-level=null",
        ] {
            assert_eq!(set(text), wanted, "{text}");
        }
    }
}
