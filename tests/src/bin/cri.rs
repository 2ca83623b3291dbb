//! `cri pull|remove IMAGE`, `cri disk`, `cri pod IMAGE -- CMD…`: what a kubelet asks of
//! containerd about images, and for a pod of one container.

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

#[allow(
    missing_debug_implementations,
    clippy::semicolon_if_nothing_returned,
    clippy::enum_variant_names
)]
mod api {
    tonic::include_proto!("runtime.v1");
}

use api::image_service_client::ImageServiceClient;
use api::runtime_service_client::RuntimeServiceClient;

#[derive(Debug, Subcommand)]
enum Action {
    /// Pull an image
    Pull {
        /// HOST/REPO:TAG
        image: String,
    },
    /// Remove an image
    Remove {
        /// HOST/REPO:TAG
        image: String,
    },
    /// Print where images are, and how many bytes containerd says that they take, a line
    /// for each place
    Disk,
    /// Run a pod on the host's network with one container, its image pulled first
    /// (`imagePullPolicy: Always`); prints what the container printed
    Pod {
        /// HOST/REPO:TAG
        image: String,
        /// As with `hostUsers: false`: in a user namespace of the pod's own, which has this
        /// id of the host as its root, and 65,535 that follow; on a network of its own, too
        #[arg(long, value_name = "ID")]
        user_namespace: Option<u32>,
        /// What the container runs
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

/// Asks over the container runtime interface
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// containerd's socket
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        default_value = "/run/containerd/containerd.sock"
    )]
    address: PathBuf,
    /// As of a pod with this runtime class
    #[arg(long, global = true, value_name = "NAME", default_value = "")]
    runtime_handler: String,
    /// Say so to a pull in the pod's annotations, where containerd 1.7 looks
    #[arg(long, global = true)]
    handler_in_annotation: bool,
}

/// How many ids a pod's user namespace has: as many as a kubelet gives it.
const IDS: u32 = 65_536;
/// Where containerd 1.7 looks for the runtime handler of a pull.
const HANDLER: &str = "io.containerd.cri.runtime-handler";
/// How long a container may run.
const PATIENCE: Duration = Duration::from_secs(300);
/// The container's log beneath the pod's directory of logs.
const LOG: &str = "main.log";

/// A kubelet's connection.
struct Kubelet {
    channel: Channel,
    handler: String,
    /// The handler of a pull, in the request's field and in the pod's annotations.
    field: String,
    annotation: Option<(String, String)>,
    /// The id of the host that is root in the pod's user namespace, if it has one.
    user_namespace: Option<u32>,
}

fn told(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

impl Kubelet {
    /// A user namespace goes with a network of the pod's own: without one the kernel
    /// does not let it mount /sys.
    fn namespaces(&self) -> Option<api::NamespaceOption> {
        let network = match self.user_namespace {
            Some(_) => api::NamespaceMode::Pod,
            None => api::NamespaceMode::Node,
        };
        let ids = |host_id| {
            vec![api::IdMapping {
                host_id,
                container_id: 0,
                length: IDS,
            }]
        };
        Some(api::NamespaceOption {
            network: network.into(),
            pid: api::NamespaceMode::Container.into(),
            ipc: api::NamespaceMode::Pod.into(),
            userns_options: self.user_namespace.map(|first| api::UserNamespace {
                mode: api::NamespaceMode::Pod.into(),
                uids: ids(first),
                gids: ids(first),
            }),
        })
    }

    fn image(&self, image: &str) -> Option<api::ImageSpec> {
        Some(api::ImageSpec {
            image: image.to_owned(),
            runtime_handler: self.field.clone(),
            ..api::ImageSpec::default()
        })
    }

    fn sandbox(&self, logs: &Path) -> api::PodSandboxConfig {
        let name = format!("pod-{}", std::process::id());
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.clone(),
                uid: name,
                namespace: "default".to_owned(),
            }),
            log_directory: logs.to_string_lossy().into_owned(),
            // Without, the host's resolv.conf is copied, which not every host has.
            dns_config: Some(api::DnsConfig {
                servers: vec!["127.0.0.1".to_owned()],
            }),
            annotations: self.annotation.clone().into_iter().collect(),
            linux: Some(api::LinuxPodSandboxConfig {
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: self.namespaces(),
                }),
            }),
        }
    }

    async fn pull(&self, image: &str, sandbox: api::PodSandboxConfig) -> Result<String> {
        let request = api::PullImageRequest {
            image: self.image(image),
            // A kubelet always sends one; containerd looks at no handler without.
            sandbox_config: Some(sandbox),
        };
        let mut images = ImageServiceClient::new(self.channel.clone());
        let pulled = images
            .pull_image(request)
            .await
            .map_err(|status| told(&status))?;
        Ok(pulled.into_inner().image_ref)
    }

    async fn remove(&self, image: &str) -> Result<()> {
        let image = self.image(image);
        let mut images = ImageServiceClient::new(self.channel.clone());
        let removed = images.remove_image(api::RemoveImageRequest { image }).await;
        removed.map(drop).map_err(|status| told(&status))
    }

    async fn disk(&self) -> Result<Vec<api::FilesystemUsage>> {
        let mut images = ImageServiceClient::new(self.channel.clone());
        let told_of = images.image_fs_info(api::ImageFsInfoRequest {}).await;
        let answer = told_of.map_err(|status| told(&status))?;
        Ok(answer.into_inner().image_filesystems)
    }

    /// Runs a pod to its container's end.
    async fn pod(&self, image: &str, command: &[String], logs: &Path) -> Result<()> {
        let sandbox = self.sandbox(logs);
        let mut runtime = RuntimeServiceClient::new(self.channel.clone());
        let request = api::RunPodSandboxRequest {
            config: Some(sandbox.clone()),
            runtime_handler: self.handler.clone(),
        };
        let started = runtime.run_pod_sandbox(request).await;
        let id = started
            .map_err(|status| told(&status))
            .context("cannot run the sandbox")?;
        let id = id.into_inner().pod_sandbox_id;
        let done = self.container(&id, sandbox, image, command).await;
        let pod_sandbox_id = id.clone();
        let stopped = runtime
            .stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id })
            .await;
        let pod_sandbox_id = id;
        let removed = runtime
            .remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id })
            .await;
        done?;
        stopped
            .map_err(|status| told(&status))
            .context("cannot stop the sandbox")?;
        removed
            .map_err(|status| told(&status))
            .context("cannot remove the sandbox")?;
        Ok(())
    }

    async fn container(
        &self,
        pod: &str,
        sandbox: api::PodSandboxConfig,
        image: &str,
        command: &[String],
    ) -> Result<()> {
        let mut runtime = RuntimeServiceClient::new(self.channel.clone());
        let pulled = self.pull(image, sandbox.clone()).await;
        // From then on a kubelet calls the image what the pull has answered.
        let image = pulled.context("cannot pull the image")?;
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(api::ContainerConfig {
                metadata: Some(api::ContainerMetadata {
                    name: "main".to_owned(),
                }),
                image: self.image(&image),
                command: command.to_vec(),
                log_path: LOG.to_owned(),
                linux: Some(api::LinuxContainerConfig {
                    security_context: Some(api::LinuxContainerSecurityContext {
                        namespace_options: self.namespaces(),
                    }),
                }),
            }),
            sandbox_config: Some(sandbox),
        };
        let created = runtime.create_container(request).await;
        let created = created
            .map_err(|status| told(&status))
            .context("cannot create the container")?;
        let container_id = created.into_inner().container_id;
        let request = api::StartContainerRequest {
            container_id: container_id.clone(),
        };
        let started = runtime.start_container(request).await;
        started
            .map_err(|status| told(&status))
            .context("cannot start the container")?;
        let since = Instant::now();
        loop {
            let request = api::ContainerStatusRequest {
                container_id: container_id.clone(),
            };
            let status = runtime
                .container_status(request)
                .await
                .map_err(|status| told(&status))?;
            let status = status.into_inner().status.unwrap_or_default();
            if status.state() == api::ContainerState::ContainerExited {
                match status.exit_code {
                    0 => return Ok(()),
                    code => bail!(
                        "the container ended with {code}: {} {}",
                        status.reason,
                        status.message
                    ),
                }
            }
            if since.elapsed() > PATIENCE {
                bail!("the container does not end: {status:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What a container printed: each line of its log is TIME STREAM TAG TEXT.
fn printed(log: &Path) -> Result<String> {
    let text = fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))?;
    let lines = text.lines().map(|line| {
        let text = line.splitn(4, ' ').nth(3).unwrap_or_default();
        format!("{text}\n")
    });
    Ok(lines.collect())
}

async fn run(arguments: Arguments) -> Result<()> {
    let socket = arguments.address;
    let what = format!("cannot reach containerd at {}", socket.display());
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(socket).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://socket");
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .context(what)?;
    let handler = arguments.runtime_handler;
    let (field, annotation) = match arguments.handler_in_annotation {
        true => (String::new(), Some((HANDLER.to_owned(), handler.clone()))),
        false => (handler.clone(), None),
    };
    let kubelet = Kubelet {
        channel,
        handler,
        field,
        annotation,
        user_namespace: match arguments.action {
            Action::Pod { user_namespace, .. } => user_namespace,
            _ => None,
        },
    };
    match arguments.action {
        Action::Pull { image } => {
            let sandbox = kubelet.sandbox(Path::new(""));
            println!("{}", kubelet.pull(&image, sandbox).await?);
        }
        Action::Remove { image } => kubelet.remove(&image).await?,
        Action::Disk => {
            for usage in kubelet.disk().await? {
                let place = usage.fs_id.unwrap_or_default().mountpoint;
                println!("{place} {}", usage.used_bytes.unwrap_or_default().value);
            }
        }
        Action::Pod { image, command, .. } => {
            let logs = std::env::temp_dir().join(format!("cri-pod-{}", std::process::id()));
            fs::create_dir(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
            let done = kubelet.pod(&image, &command, &logs).await;
            let text = printed(&logs.join(LOG));
            fs::remove_dir_all(&logs)?;
            match done {
                Ok(()) => print!("{}", text?),
                Err(error) => {
                    print!("{}", text.unwrap_or_default());
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(arguments))
}
