//! `kubectl accel`: tasks without writing YAML.

use accel_controller::command::{self, Waiting};
use accel_controller::conditions;
use accel_controller::job::selector;
use accel_controller::labels::COMPONENT;
use accel_controller::plan::is_kept;
use accel_controller::purge::PURGED;
use accel_controller::resource::{
    AcceleratedImage, AcceleratedImageSpec, ImageAcceleration, SERVICE_NAME,
};
use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt as _};
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
        /// The controller's namespace
        #[arg(long, value_name = "NAME", default_value = "image-accel")]
        controller: String,
        /// How
        #[arg(short, long, value_enum)]
        output: Option<Output>,
    },
    /// Show tasks.
    Get {
        /// The task's name, its source or its target [default: all]
        #[arg(value_name = "NAME|IMAGE")]
        name: Option<String>,
        /// In all namespaces
        #[arg(short = 'A', long)]
        all_namespaces: bool,
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
            eprintln!("kubectl accel: {error:#}");
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
            enable(&Api::all(client), &spec, wait).await
        }
        Command::Disable { purge, wait } => disable(&Api::all(client), purge, wait).await,
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
            tasks.create(&name, spec, wait).await
        }
        Command::Delete { name, wait } => tasks.delete(&name, wait).await,
        Command::Nodes { controller, output } => {
            let of_nodes = ListParams::default().labels(&selector(COMPONENT));
            let leases = Api::<Lease>::namespaced(client.clone(), &controller);
            let leases = leases.list(&of_nodes).await.map_err(said)?;
            let all = Api::<Node>::all(client.clone());
            let all = all.list_metadata(&ListParams::default()).await;
            let all = all.map_err(said)?.items;
            let service = Api::<ImageAcceleration>::all(client);
            let service = service.get_opt(SERVICE_NAME).await.map_err(said)?;
            let state = |node| command::node_state(node, &leases.items, service.as_ref());
            let states: Vec<_> = all.iter().map(state).collect();
            match output {
                None | Some(Output::Wide) => say(&command::nodes_table(&states)),
                Some(Output::Json) => say(&serde_json::to_string_pretty(&states)?),
                Some(Output::Yaml) => say(&serde_saphyr::to_string(&states)?),
            }
        }
        Command::Get {
            name,
            all_namespaces,
            output,
        } => {
            let tasks = match all_namespaces {
                true => Tasks(Api::all(client)),
                false => tasks,
            };
            tasks.get(name.as_deref(), all_namespaces, output).await
        }
    }
}

impl Wait {
    fn deadline(self) -> Option<Instant> {
        Instant::now().checked_add(Duration::from_secs(self.timeout))
    }
}

/// Waits a little, or fails with `what` when it is too late.
async fn pause(deadline: Option<Instant>, what: &str) -> Result<()> {
    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
        bail!("{what}; it has not been waited for any longer, and goes on");
    }
    tokio::time::sleep(LOOK).await;
    Ok(())
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

async fn enable(services: &Api<ImageAcceleration>, spec: &Value, wait: Wait) -> Result<()> {
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
    let deadline = wait.deadline();
    loop {
        let service = services.get(SERVICE_NAME).await.map_err(said)?;
        match command::enabling(&service) {
            (Waiting::Done, what) => return say(&format!("ready: {what}")),
            (Waiting::Failed(what), _) => bail!("{what}"),
            (Waiting::GoesOn, what) => pause(deadline, &what).await?,
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
async fn delete_with_all(
    services: &Api<ImageAcceleration>,
    deadline: Option<Instant>,
) -> Result<()> {
    // The controller keeps it from now on; deleted before that, it would be gone at once.
    while !is_kept(&services.get(SERVICE_NAME).await.map_err(said)?) {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            bail!("the controller does not answer");
        }
        tokio::time::sleep(LOOK).await;
    }
    let now = DeleteParams::default();
    services
        .delete(SERVICE_NAME, &now)
        .await
        .map(drop)
        .map_err(said)
}

async fn disable(services: &Api<ImageAcceleration>, purge: bool, wait: Wait) -> Result<()> {
    let deadline = wait.deadline();
    // As it is said now, whatever was said before.
    set_purge(services, purge).await?;
    if purge {
        let deleted = tokio::select! {
            deleted = delete_with_all(services, deadline) => deleted,
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
        pause(deadline, &format!("acceleration is not off yet{left}")).await?;
    }
    say(&format!("imageacceleration {SERVICE_NAME} deleted"))
}

struct Tasks(Api<AcceleratedImage>);

impl Tasks {
    async fn create(&self, name: &str, spec: AcceleratedImageSpec, wait: Wait) -> Result<()> {
        let task = AcceleratedImage::new(name, spec);
        match self.0.create(&PostParams::default(), &task).await {
            Ok(_) => say(&format!("acceleratedimage {name} created"))?,
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let there = self.0.get(name).await.map_err(said)?;
                if there.spec != task.spec {
                    bail!(
                        "there is a task {name} already, for {}: choose another name with --name",
                        there.spec.source
                    );
                }
                say(&format!("acceleratedimage {name} unchanged"))?;
            }
            Err(error) => return Err(said(error)),
        }
        if wait.wait {
            self.wait(name, wait).await?;
        }
        Ok(())
    }

    async fn wait(&self, name: &str, wait: Wait) -> Result<()> {
        let deadline = wait.deadline();
        // On standard error, and only if that is a terminal.
        let bar = ProgressBar::no_length();
        let style = ProgressStyle::with_template("{spinner} {bar:30} {msg}")?;
        bar.set_style(style);
        bar.enable_steady_tick(LOOK);
        loop {
            let task = self.0.get(name).await.map_err(said)?;
            match command::waiting(&task) {
                Waiting::Done => {
                    bar.finish_and_clear();
                    let target = task.status.map(|status| status.target).unwrap_or_default();
                    return say(&format!("acceleratedimage {name} is ready: {target}"));
                }
                Waiting::Failed(why) => {
                    bar.finish_and_clear();
                    bail!("{name}: {why}");
                }
                Waiting::GoesOn => {}
            }
            let status = task.current().cloned().unwrap_or_default();
            let text = match status.progress {
                Some(progress) => {
                    bar.set_length(progress.bytes);
                    bar.set_position(progress.bytes_done);
                    progress.text
                }
                None => status.message.clone(),
            };
            bar.set_message(text);
            let what = format!("{name} is not ready: {}", status.message);
            pause(deadline, &what).await?;
        }
    }

    async fn delete(&self, name: &str, wait: Wait) -> Result<()> {
        let all = self.0.list(&ListParams::default()).await.map_err(said)?;
        let found = command::named(&all.items, name);
        if found.is_empty() {
            bail!("there is no task {name}, and none for an image of that name");
        }
        let deadline = wait.deadline();
        for task in found {
            let name = task.name_any();
            self.0
                .delete(&name, &DeleteParams::default())
                .await
                .map_err(said)?;
            if wait.wait {
                self.wait_gone(&name, task.uid().as_deref(), deadline)
                    .await?;
            }
            say(&format!("acceleratedimage {name} deleted"))?;
        }
        Ok(())
    }

    /// Until the task of that name is gone, or another one.
    async fn wait_gone(
        &self,
        name: &str,
        uid: Option<&str>,
        deadline: Option<Instant>,
    ) -> Result<()> {
        loop {
            match self.0.get_opt(name).await.map_err(said)? {
                Some(there) if there.uid().as_deref() == uid => {
                    let status = there.status.unwrap_or_default();
                    let what = format!("{name} is not gone yet: {}", status.message);
                    pause(deadline, &what).await?;
                }
                _ => return Ok(()),
            }
        }
    }

    async fn get(
        &self,
        name: Option<&str>,
        namespaces: bool,
        output: Option<Output>,
    ) -> Result<()> {
        let mut all = self
            .0
            .list(&ListParams::default())
            .await
            .map_err(said)?
            .items;
        if let Some(name) = name {
            let found = command::named(&all, name).into_iter().cloned().collect();
            all = found;
            if all.is_empty() {
                bail!("there is no task {name}, and none for an image of that name");
            }
        }
        for task in &mut all {
            task.metadata.managed_fields = None;
        }
        match output {
            None | Some(Output::Wide) => {
                let wide = output.is_some();
                say(&command::table(&all, namespaces, wide, Timestamp::now()))
            }
            Some(Output::Json) => say(&serde_json::to_string_pretty(&List::new(all))?),
            Some(Output::Yaml) => say(&serde_saphyr::to_string(&List::new(all))?),
        }
    }
}

/// As kubectl prints several objects.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List {
    api_version: &'static str,
    kind: &'static str,
    items: Vec<AcceleratedImage>,
}

impl List {
    const fn new(items: Vec<AcceleratedImage>) -> Self {
        Self {
            api_version: "v1",
            kind: "List",
            items,
        }
    }
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
