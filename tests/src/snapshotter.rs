//! A snapshotter of one check's own, asked as containerd asks it.

use crate::Setting;
use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// containerd's snapshots service.
#[allow(
    missing_debug_implementations,
    missing_docs,
    clippy::semicolon_if_nothing_returned
)]
pub mod api {
    tonic::include_proto!("containerd.services.snapshots.v1");
}

use api::snapshots_client::SnapshotsClient;

const PATIENCE: Duration = Duration::from_secs(120);
/// Only a bound: containerd would wait longer.
const ANSWER: Duration = Duration::from_secs(100);

/// A label's key and value for each.
pub type Labels = BTreeMap<String, String>;

/// A running `accel-snapshotter serve`.
#[derive(Debug)]
pub struct Snapshotter {
    program: PathBuf,
    server: PathBuf,
    directory: PathBuf,
    child: Child,
    runtime: Runtime,
    client: SnapshotsClient<Channel>,
    /// How long it may take to answer.
    pub patience: Duration,
}

impl Snapshotter {
    /// Starts one beneath `directory`, for the `ublk-server` at a socket.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(setting: &Setting, server: &Path, directory: &Path) -> Result<Self> {
        let program = setting.bin.join("accel-snapshotter");
        let child = spawn(&program, server, directory, &[])?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let client = runtime.block_on(connect(&directory.join("socket")))?;
        Ok(Self {
            program,
            server: server.to_owned(),
            directory: directory.to_owned(),
            child,
            runtime,
            client,
            patience: ANSWER,
        })
    }

    /// Its root directory.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// What it logged.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Kills it, whatever it is doing.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts another in its place.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.restart_with(&[])
    }

    /// The same with further options.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart_with(&mut self, options: &[&str]) -> Result<()> {
        self.child = spawn(&self.program, &self.server, &self.directory, options)?;
        let socket = self.directory.join("socket");
        self.client = self.runtime.block_on(connect(&socket))?;
        Ok(())
    }

    fn ask<T, F>(
        &mut self,
        request: impl FnOnce(SnapshotsClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let asked = request(self.client.clone());
        self.runtime.block_on(async {
            match tokio::time::timeout(self.patience, asked).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded("no answer in time")),
            }
        })
    }

    /// Makes an active snapshot.
    ///
    /// # Errors
    /// What it says.
    pub fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: &Labels,
    ) -> Result<Vec<api::Mount>, Status> {
        let request = create(key, parent, labels);
        self.ask(|mut client| async move { client.prepare(request).await })
            .map(|answer| answer.mounts)
    }

    /// Makes a view.
    ///
    /// # Errors
    /// What it says.
    pub fn view(&mut self, key: &str, parent: &str) -> Result<Vec<api::Mount>, Status> {
        let request = create(key, parent, &Labels::new());
        self.ask(|mut client| async move { client.view(request).await })
            .map(|answer| answer.mounts)
    }

    /// The mounts of a view or active snapshot.
    ///
    /// # Errors
    /// What it says.
    pub fn mounts(&mut self, key: &str) -> Result<Vec<api::Mount>, Status> {
        let request = key_request(key);
        self.ask(|mut client| async move { client.mounts(request).await })
            .map(|answer| answer.mounts)
    }

    /// Makes an active snapshot a committed one.
    ///
    /// # Errors
    /// What it says.
    pub fn commit(&mut self, key: &str, name: &str, labels: &Labels) -> Result<(), Status> {
        let request = api::CommitRequest {
            key: key.to_owned(),
            name: name.to_owned(),
            labels: labels.clone().into_iter().collect(),
            ..api::CommitRequest::default()
        };
        self.ask(|mut client| async move { client.commit(request).await })
    }

    /// Removes one.
    ///
    /// # Errors
    /// What it says.
    pub fn remove(&mut self, key: &str) -> Result<(), Status> {
        let request = key_request(key);
        self.ask(|mut client| async move { client.remove(request).await })
    }

    /// What there is to know of one.
    ///
    /// # Errors
    /// What it says.
    pub fn stat(&mut self, key: &str) -> Result<api::Info, Status> {
        let request = key_request(key);
        self.ask(|mut client| async move { client.stat(request).await })
            .map(|answer| answer.info.unwrap_or_default())
    }

    /// Disk space of one.
    ///
    /// # Errors
    /// What it says.
    pub fn usage(&mut self, key: &str) -> Result<api::UsageResponse, Status> {
        let request = key_request(key);
        self.ask(|mut client| async move { client.usage(request).await })
    }

    /// All that match a filter; an empty one matches all.
    ///
    /// # Errors
    /// What it says.
    pub fn walk(&mut self, filter: &str) -> Result<Vec<api::Info>, Status> {
        let request = api::ListRequest {
            filters: vec![filter.to_owned()],
            ..api::ListRequest::default()
        };
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let walked = async {
                let mut pages = client.list(request).await?.into_inner();
                let mut all = Vec::new();
                while let Some(page) = pages.message().await? {
                    all.extend(page.info);
                }
                Ok(all)
            };
            match tokio::time::timeout(self.patience, walked).await {
                Ok(answer) => answer,
                Err(_) => Err(Status::deadline_exceeded("no answer in time")),
            }
        })
    }

    /// Deletes and unmounts what no snapshot needs.
    ///
    /// # Errors
    /// What it says.
    pub fn cleanup(&mut self) -> Result<(), Status> {
        self.ask(|mut client| async move { client.cleanup(api::CleanupRequest::default()).await })
    }

    /// As containerd does for a layer of a pull: asks for it, and finds the committed
    /// snapshot that there is then. None: it has to be unpacked, into these mounts.
    ///
    /// # Errors
    /// When the answer is none of the two.
    pub fn pull(
        &mut self,
        key: &str,
        parent: &str,
        labels: &Labels,
    ) -> Result<(Option<String>, Vec<api::Mount>)> {
        match self.prepare(key, parent, labels) {
            Ok(mounts) => Ok((None, mounts)),
            Err(status) if status.code() == Code::AlreadyExists => {
                let chain = &labels[REF];
                let filter = format!("labels.\"{REF}\"=={chain},parent=={parent:?}");
                let mut found = self.walk(&filter)?;
                // Others may have unpacked it, or be about to; containerd takes the first that
                // is committed.
                found
                    .retain(|info| info.name.starts_with("lazy/") || info.name.starts_with("ufs/"));
                let lazy = found.iter().filter(|info| info.name.starts_with("lazy/"));
                let (lazy, number) = (lazy.count(), found.len());
                let Some(one) = found.first().filter(|_| lazy < 2 && number - lazy < 2) else {
                    bail!("{number} lazy snapshots of {chain} on {parent:?}");
                };
                ensure!(one.kind == i32::from(api::Kind::Committed), "{one:?}");
                Ok((Some(one.name.clone()), Vec::new()))
            }
            Err(status) => Err(status.into()),
        }
    }
}

/// The label that has the chain ID.
pub const REF: &str = "containerd.io/snapshot.ref";

fn key_request(key: &str) -> api::KeyRequest {
    api::KeyRequest {
        key: key.to_owned(),
        ..api::KeyRequest::default()
    }
}

fn create(key: &str, parent: &str, labels: &Labels) -> api::PrepareRequest {
    api::PrepareRequest {
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: labels.clone().into_iter().collect(),
        ..api::PrepareRequest::default()
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn spawn(program: &Path, server: &Path, directory: &Path, options: &[&str]) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))?;
    Command::new(program)
        .args(["serve", "--budget", "60", "--root"])
        .arg(directory.join("root"))
        .arg("--socket")
        .arg(directory.join("socket"))
        .arg("--server")
        .arg(server)
        .args(options)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

async fn connect(socket: &Path) -> Result<SnapshotsClient<Channel>> {
    let started = Instant::now();
    loop {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://socket");
        match endpoint.connect_with_connector(connector).await {
            Ok(channel) => return Ok(SnapshotsClient::new(channel)),
            Err(error) if started.elapsed() > PATIENCE => {
                return Err(error)
                    .with_context(|| format!("no snapshotter at {}", socket.display()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
