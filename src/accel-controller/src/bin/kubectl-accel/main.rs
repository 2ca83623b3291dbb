//! `kubectl accel`: tasks without writing YAML.

mod patience;
mod tasks;

use self::patience::Patience;
use self::tasks::Tasks;
use accel_controller::command::{self, ControllerState, ServiceState, Waiting};
use accel_controller::conditions;
use accel_controller::job::selector;
use accel_controller::labels::COMPONENT;
use accel_controller::lead::{Ear, Leader};
use accel_controller::plan::is_kept;
use accel_controller::purge::PURGED;
use accel_controller::resource::{AcceleratedImageSpec, ImageAcceleration, SERVICE_NAME};
use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often to look while waiting.
const LOOK: Duration = Duration::from_millis(500);

/// Has images converted, so that pods start from them without downloading them.
///
/// An image is named as pods name it, with the registry.
#[derive(Debug, Parser)]
#[command(name = "kubectl accel", bin_name = "kubectl accel", version)]
struct Cli {
    /// The tasks' namespace [default: the context's]
    #[arg(short, long, global = true, value_name = "NAME")]
    namespace: Option<String>,
    /// The context in the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// The controller's namespace
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        default_value = "image-accel"
    )]
    controller: String,
    /// The kubeconfig [default: KUBECONFIG, or ~/.kube/config]
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Turn acceleration on, or change how it is done: what is not named stays as it is.
    Enable {
        #[command(flatten)]
        ufs: Ufs,
        /// The Secret with the registries' logins, in the controller's namespace
        #[arg(long, value_name = "NAME")]
        secret: Option<String>,
        #[arg(
            long,
            value_name = "HOST[:PORT][/PREFIX]",
            help = "Where accelerated images go that are given no target [default: beside the source]"
        )]
        push_to: Option<String>,
        /// Talk HTTP to registries
        #[arg(long)]
        plain_http: bool,
        /// How many images to convert at a time
        #[arg(long, value_name = "N")]
        limit: Option<u16>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Turn acceleration off. Images that were converted stay.
    Disable {
        /// Remove them instead: all tasks, and what they have made on UFS and in registries,
        /// as soon as no node uses it
        #[arg(long)]
        purge: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Have an image converted.
    Create {
        /// The image
        source: String,
        /// What the accelerated image is called [default: the source's name with -acc]
        #[arg(long, value_name = "IMAGE")]
        target: Option<String>,
        #[arg(
            long,
            value_name = "OS/ARCHITECTURE[/VARIANT]|all",
            help = "Which of its platforms; may be given several times [default: that of the node that converts it]"
        )]
        platform: Vec<String>,
        /// The Secret with the registries' logins, in the task's namespace, instead of that
        /// of the ImageAcceleration
        #[arg(long, value_name = "NAME")]
        secret: Option<String>,
        /// What the task is called [default: after the image]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Delete tasks.
    Delete {
        /// The task's name, its source or its target
        #[arg(value_name = "NAME|IMAGE")]
        name: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Show which nodes can start accelerated images, and why others cannot.
    Nodes {
        /// How
        #[arg(short, long, value_enum)]
        output: Option<Output>,
    },
    /// Show tasks, or how acceleration as a whole is.
    Get {
        /// The task's name, its source or its target [default: all]
        #[arg(value_name = "NAME|IMAGE")]
        name: Option<String>,
        /// In all namespaces
        #[arg(short = 'A', long)]
        all_namespaces: bool,
        /// Show how acceleration is instead, and whether a controller works
        #[arg(long, conflicts_with_all = ["name", "all_namespaces"])]
        service: bool,
        /// How
        #[arg(short, long, value_enum)]
        output: Option<Output>,
    },
}

/// Where UFS is for the Jobs.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = false)]
struct Ufs {
    /// A claim for UFS in the controller's namespace
    #[arg(long, value_name = "NAME")]
    claim: Option<String>,
    /// An NFS server, and the directory on it
    #[arg(long, value_name = "SERVER:PATH", value_parser = nfs)]
    nfs: Option<(String, String)>,
    /// Where the nodes on which Jobs run have UFS mounted
    #[arg(long, value_name = "PATH")]
    host_path: Option<String>,
}

fn nfs(text: &str) -> Result<(String, String), String> {
    match text.split_once(":/") {
        Some((server, path)) if !server.is_empty() => Ok((server.to_owned(), format!("/{path}"))),
        _ => Err("it is not SERVER:PATH with an absolute path".to_owned()),
    }
}

impl Ufs {
    /// One takes the place of the other.
    fn spec(&self) -> Value {
        let nfs = self.nfs.as_ref();
        let nfs = nfs.map(|(server, path)| json!({"server": server, "path": path}));
        json!({"claimName": self.claim, "nfs": nfs, "hostPath": self.host_path})
    }
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct Wait {
    /// Come back when it is done, with 1 if it fails
    #[arg(long)]
    wait: bool,
    /// How long to wait, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "3600",
        requires = "wait"
    )]
    timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Wide,
    Json,
    Yaml,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "kubectl accel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let options = KubeConfigOptions {
        context: cli.context,
        ..KubeConfigOptions::default()
    };
    let config = match &cli.kubeconfig {
        Some(path) => Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &options).await,
        None => Config::from_kubeconfig(&options).await,
    };
    let config = config.context("the kubeconfig cannot be used")?;
    let namespace = cli
        .namespace
        .unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config)?;
    let tasks = Tasks(Api::namespaced(client.clone(), &namespace));
    let leases = Api::<Lease>::namespaced(client.clone(), &cli.controller);
    let ear = Ear::new(leases.clone());
    match cli.command {
        Command::Enable {
            ufs,
            secret,
            push_to,
            plain_http,
            limit,
            wait,
        } => {
            let mut registry = Map::new();
            registry.extend(secret.map(|name| ("secretName".to_owned(), json!(name))));
            registry.extend(push_to.map(|prefix| ("pushTo".to_owned(), json!(prefix))));
            registry.extend(plain_http.then(|| ("plainHttp".to_owned(), json!(true))));
            let mut jobs = Map::new();
            jobs.extend(limit.map(|limit| ("limit".to_owned(), json!(limit))));
            let spec = json!({"ufs": ufs.spec(), "registry": registry, "jobs": jobs});
            enable(&Api::all(client), &spec, wait, ear).await
        }
        Command::Disable { purge, wait } => disable(&Api::all(client), purge, wait, ear).await,
        Command::Create {
            source,
            target,
            platform,
            secret,
            name,
            wait,
        } => {
            let name = name.unwrap_or_else(|| command::name_for(&source));
            let spec = AcceleratedImageSpec {
                source,
                target,
                platforms: platform,
                secret_name: secret,
            };
            let patience = wait.wait.then(|| wait.patience(ear));
            tasks.create(&name, spec, patience).await
        }
        Command::Delete { name, wait } => {
            let patience = wait.wait.then(|| wait.patience(ear));
            tasks.delete(&name, patience).await
        }
        Command::Nodes { output } => {
            let of_nodes = ListParams::default().labels(&selector(COMPONENT));
            let leases = leases.list(&of_nodes).await.map_err(said)?;
            let all = Api::<Node>::all(client.clone());
            let all = all.list_metadata(&ListParams::default()).await;
            let all = all.map_err(said)?.items;
            let service = Api::<ImageAcceleration>::all(client);
            let service = service.get_opt(SERVICE_NAME).await.map_err(said)?;
            let state = |node| command::node_state(node, &leases.items, service.as_ref());
            let states: Vec<_> = all.iter().map(state).collect();
            match output {
                None | Some(Output::Wide) => say(&command::nodes_table(&states))?,
                Some(output) => say_all(&states, output)?,
            }
            tell_if_none_leads(ear).await;
            Ok(())
        }
        Command::Get {
            service: true,
            output,
            ..
        } => get_service(&Api::all(client), ear, output).await,
        Command::Get {
            name,
            all_namespaces,
            output,
            service: false,
        } => {
            let tasks = match all_namespaces {
                true => Tasks(Api::all(client)),
                false => tasks,
            };
            tasks.get(name.as_deref(), all_namespaces, output).await?;
            tell_if_none_leads(ear).await;
            Ok(())
        }
    }
}

impl Wait {
    fn patience(self, ear: Ear) -> Patience {
        let deadline = Instant::now().checked_add(Duration::from_secs(self.timeout));
        Patience::new(deadline, ear)
    }
}

/// What the API server says, without the rest.
fn said(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("{}", status.message),
        error => error.into(),
    }
}

fn say(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

/// For programs.
fn say_all(what: &impl Serialize, output: Output) -> Result<()> {
    match output {
        Output::Yaml => say(&serde_saphyr::to_string(what)?),
        _ => say(&serde_json::to_string_pretty(what)?),
    }
}

/// What tasks and nodes' labels say may be long over then. Whoever may not see the Lease is told nothing.
async fn tell_if_none_leads(mut ear: Ear) {
    if let Ok(leader @ Leader::None(_)) = ear.ask().await {
        let _ = writeln!(std::io::stderr(), "{leader}");
    }
}

async fn get_service(
    services: &Api<ImageAcceleration>,
    mut ear: Ear,
    output: Option<Output>,
) -> Result<()> {
    let mut service = services.get_opt(SERVICE_NAME).await.map_err(said)?;
    if let Some(service) = &mut service {
        service.metadata.managed_fields = None;
    }
    let leader = ear
        .ask()
        .await
        .map_err(|error| format!("{:#}", said(error)));
    let state = ServiceState {
        controller: ControllerState::of(leader.as_ref()),
        service,
    };
    match output {
        None | Some(Output::Wide) => say(&command::service_table(&state)),
        Some(output) => say_all(&state, output),
    }
}

async fn enable(
    services: &Api<ImageAcceleration>,
    spec: &Value,
    wait: Wait,
    ear: Ear,
) -> Result<()> {
    let there = services.get_opt(SERVICE_NAME).await.map_err(said)?;
    let service =
        command::enabled(there.as_ref(), spec, Timestamp::now()).map_err(anyhow::Error::msg)?;
    let done = match there {
        Some(_) => {
            let patch = Patch::Merge(&service);
            let patched = services
                .patch(SERVICE_NAME, &PatchParams::default(), &patch)
                .await;
            patched.map(|_| "changed")
        }
        None => {
            let service = serde_json::from_value(service)?;
            let created = services.create(&PostParams::default(), &service).await;
            created.map(|_| "created")
        }
    };
    say(&format!(
        "imageacceleration {SERVICE_NAME} {}",
        done.map_err(said)?
    ))?;
    if !wait.wait {
        return Ok(());
    }
    let mut patience = wait.patience(ear);
    loop {
        let service = services.get(SERVICE_NAME).await.map_err(said)?;
        match command::enabling(&service) {
            // Or it was, when a controller was there that could say so.
            (Waiting::Done, _) if patience.is_unattended().await => {
                patience.pause("no controller is at work").await?;
            }
            (Waiting::Done, what) => return say(&format!("ready: {what}")),
            (Waiting::Failed(what), _) => bail!("{what}"),
            (Waiting::GoesOn, what) => patience.pause(&what).await?,
        }
    }
}

async fn set_purge(services: &Api<ImageAcceleration>, purge: bool) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": {"purge": purge}}));
    let plain = PatchParams::default();
    let patched = services.patch(SERVICE_NAME, &plain, &patch).await;
    patched.map(drop).map_err(said)
}

/// Deletes the service, which stays until all is gone that was made.
async fn delete_with_all(services: &Api<ImageAcceleration>, patience: &mut Patience) -> Result<()> {
    // The controller keeps it from now on; deleted before that, it would be gone at once.
    while !is_kept(&services.get(SERVICE_NAME).await.map_err(said)?) {
        let what = "the controller does not answer";
        patience.pause_or_end(what).await?;
    }
    let now = DeleteParams::default();
    services
        .delete(SERVICE_NAME, &now)
        .await
        .map(drop)
        .map_err(said)
}

async fn disable(
    services: &Api<ImageAcceleration>,
    purge: bool,
    wait: Wait,
    ear: Ear,
) -> Result<()> {
    let mut patience = wait.patience(ear);
    // As it is said now, whatever was said before.
    set_purge(services, purge).await?;
    if purge {
        let deleted = tokio::select! {
            deleted = delete_with_all(services, &mut patience) => deleted,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        };
        if let Err(error) = deleted {
            // Or whoever deletes it some day, for another reason, would remove everything.
            return Err(match set_purge(services, false).await {
                Ok(()) => error.context("spec.purge is set back"),
                Err(still) => error.context(format!(
                    "spec.purge could not be set back ({still:#}): `kubectl accel enable` does that"
                )),
            });
        }
    } else {
        let now = DeleteParams::default();
        services.delete(SERVICE_NAME, &now).await.map_err(said)?;
    }
    while wait.wait
        && let Some(service) = services.get_opt(SERVICE_NAME).await?
    {
        let status = service.status.unwrap_or_default();
        let purged = conditions::find(&status.conditions, PURGED);
        let left = purged.map_or_else(String::new, |condition| format!(": {}", condition.message));
        let what = format!("acceleration is not off yet{left}");
        patience.pause(&what).await?;
    }
    say(&format!("imageacceleration {SERVICE_NAME} deleted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ufs_is_named_in_one_way() {
        let parse = |arguments: &[&str]| {
            let all = ["accel", "enable"].iter().chain(arguments);
            match Cli::try_parse_from(all) {
                Ok(Cli {
                    command: Command::Enable { ufs, .. },
                    ..
                }) => Some(ufs.spec()),
                _ => None,
            }
        };
        let spec = |claim: Value, nfs: Value, path: Value| {
            Some(json!({"claimName": claim, "nfs": nfs, "hostPath": path}))
        };
        let none = Value::Null;
        let nfs = json!({"server": "[fd00::1]", "path": "/a"});
        assert_eq!(
            parse(&["--claim", "u"]),
            spec(json!("u"), none.clone(), none.clone())
        );
        assert_eq!(
            parse(&["--nfs", "[fd00::1]:/a"]),
            spec(none.clone(), nfs, none.clone())
        );
        assert_eq!(
            parse(&["--host-path", "/a"]),
            spec(none.clone(), none, json!("/a"))
        );
        for wrong in [
            &[][..],
            &["--claim", "u", "--host-path", "/a"],
            &["--nfs", "h"],
            &["--nfs", ":/a"],
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
