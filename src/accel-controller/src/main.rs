//! The controller and its command line.

use accel_controller::job::{self, Settings};
use accel_controller::metrics::Metrics;
use accel_controller::{lead, login, node, resource, run};
use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client, ResourceExt as _};
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// How long to wait for the first answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Converts images on a Kubernetes cluster, as its resources ask for.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controller. Several may run: one works, the others wait. The cluster is that
    /// of the pod it runs in, or of KUBECONFIG.
    Run {
        /// The image with mkfs-accel that Jobs run.
        #[arg(long, value_name = "IMAGE")]
        job_image: String,
        /// Where Jobs, the claim for UFS and the registry's Secret are [default: the pod's
        /// namespace]
        #[arg(long, value_name = "NAME")]
        namespace: Option<String>,
        /// What this process is called among several; the pod's name by default.
        #[arg(long, value_name = "NAME")]
        identity: Option<String>,
        /// Where to answer Prometheus over HTTP (`/metrics`), such as 0.0.0.0:8080: to whoever
        /// reaches that address
        #[arg(long, value_name = "ADDR:PORT")]
        metrics: Option<SocketAddr>,
    },
    /// On a node: tell the cluster how the node is, as `accel-snapshotter agent --health`
    /// has written it down. The cluster is that of KUBECONFIG.
    Node {
        /// What the node is called
        #[arg(long, value_name = "NAME")]
        node: String,
        /// The agent's file
        #[arg(long, value_name = "FILE")]
        health: PathBuf,
        /// The controller's namespace
        #[arg(long, value_name = "NAME", default_value = "image-accel")]
        namespace: String,
    },
    /// Print what a node needs in the cluster to tell how it is, and nothing else, for
    /// `kubectl apply -f -`: an account of its own with a token, and its Lease.
    NodeAccess {
        /// What the node is called
        #[arg(value_name = "NODE")]
        node: String,
        /// The controller's namespace
        #[arg(long, value_name = "NAME", default_value = "image-accel")]
        namespace: String,
    },
    /// Print what lets the controller read one Secret, which tasks of its namespace can then
    /// name (spec.secretName), and nothing else, for `kubectl apply -f -`.
    SecretAccess {
        /// The Secret's namespace
        #[arg(value_name = "NAMESPACE")]
        of: String,
        /// The Secret
        #[arg(value_name = "SECRET")]
        secret: String,
        /// The controller's namespace
        #[arg(long, value_name = "NAME", default_value = "image-accel")]
        namespace: String,
    },
    /// Print the Job that tries UFS, as it is for an ImageAcceleration whose spec is on standard
    /// input; both are JSON.
    #[command(hide = true)]
    CheckJob {
        /// The image with mkfs-accel that it runs
        #[arg(long, value_name = "IMAGE")]
        job_image: String,
        /// The controller's namespace
        #[arg(long, value_name = "NAME", default_value = "image-accel")]
        namespace: String,
    },
    /// Print the definitions of the resources, for `kubectl apply -f -`.
    Crds {
        /// Write them to this directory instead, a file each
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // Or a line that cannot be written there is a panic.
        .log_internal_errors(false)
        .init();
    let done = match Cli::parse().command {
        Command::Run {
            job_image,
            namespace,
            identity,
            metrics,
        } => serve(job_image, namespace, identity, metrics),
        Command::Node {
            node,
            health,
            namespace,
        } => tell(&node, &health, &namespace),
        Command::NodeAccess { node, namespace } => {
            node::access(&namespace, &node).and_then(|text| print(&text))
        }
        Command::SecretAccess {
            of,
            secret,
            namespace,
        } => login::access(&namespace, &of, &secret).and_then(|text| print(&text)),
        Command::CheckJob {
            job_image,
            namespace,
        } => check_job(job_image, namespace),
        Command::Crds { out } => crds(out.as_deref()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "accel-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> Result<()> {
    write!(std::io::stdout(), "{text}")?;
    Ok(())
}

fn check_job(image: String, namespace: String) -> Result<()> {
    let spec = serde_json::from_reader(std::io::stdin().lock());
    let spec = spec.context("standard input is no spec of an ImageAcceleration")?;
    let settings = Settings {
        namespace,
        image,
        cluster: String::new(),
    };
    let job = job::build_check("accel-check".to_owned(), &spec, None, &settings);
    print(&serde_json::to_string_pretty(&job)?)
}

fn crds(out: Option<&Path>) -> Result<()> {
    for (name, text) in resource::definitions_yaml()? {
        match out {
            Some(directory) => {
                let path = directory.join(name);
                std::fs::write(&path, text).with_context(|| format!("cannot write {path:?}"))?;
            }
            None => print(&format!("---\n{text}\n"))?,
        }
    }
    Ok(())
}

#[tokio::main]
async fn tell(node: &str, health: &Path, namespace: &str) -> Result<()> {
    let client = Client::try_default()
        .await
        .context("the cluster cannot be found by KUBECONFIG")?;
    let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        () = node::run(client, namespace, node, health) => {}
        _ = end.recv() => {}
    }
    Ok(())
}

/// What the cluster is called on UFS: the UID of a namespace that lasts as long as it.
async fn cluster(client: &Client) -> Result<String> {
    let namespaces = Api::<Namespace>::all(client.clone());
    let system = namespaces.get_metadata("kube-system");
    let system = tokio::time::timeout(PATIENCE, system).await;
    let system = system.context("the cluster does not answer")?;
    let system = system.context("cannot see which cluster this is")?;
    system.uid().context("the namespace kube-system has no UID")
}

#[tokio::main]
async fn serve(
    job_image: String,
    namespace: Option<String>,
    identity: Option<String>,
    metrics: Option<SocketAddr>,
) -> Result<()> {
    let told = Arc::new(Metrics::default());
    if let Some(address) = metrics {
        let told = Arc::clone(&told);
        let address = accel_metrics::start(address, move || Some(told.text()))
            .with_context(|| format!("cannot serve metrics at {address}"))?;
        info!(%address, "metrics are served at /metrics");
    }
    let client = Client::try_default()
        .await
        .context("the cluster cannot be found: neither in a pod nor by KUBECONFIG")?;
    let namespace = namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let identity = match identity.or_else(|| std::env::var("HOSTNAME").ok()) {
        Some(name) if !name.is_empty() => format!("{name}-{}", std::process::id()),
        _ => bail!("--identity is missing: there is no HOSTNAME to take it from"),
    };
    let candidate = lead::Candidate {
        leases: Api::namespaced(client.clone(), &namespace),
        identity: identity.clone(),
    };
    let settings = Settings {
        namespace,
        image: job_image,
        cluster: cluster(&client).await?,
    };
    let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let leading = async {
        candidate.lead().await?;
        info!(identity, "leads");
        tokio::select! {
            lost = candidate.keep() => Err(lost),
            () = run::run(client, settings, identity.clone(), Arc::clone(&told)) => bail!("the loop has ended"),
        }
    };
    tokio::select! {
        led = leading => {
            if let Err(error) = &led {
                error!("{error:#}");
            }
            led
        }
        _ = end.recv() => {
            candidate.give_up().await;
            Ok(())
        }
        _ = tokio::signal::ctrl_c() => {
            candidate.give_up().await;
            Ok(())
        }
    }
}
