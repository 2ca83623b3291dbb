//! The gRPC services, over what the snapshotter does.

use crate::mounts::Mount;
use crate::snapshot::{Kind, Moment, Snapshot};
use crate::snapshotter::{Failure, Snapshotter};
use crate::store::StoreError;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

/// Generated from `proto/`.
#[allow(
    missing_debug_implementations,
    clippy::semicolon_if_nothing_returned,
    clippy::needless_pass_by_value
)]
pub mod wire {
    /// containerd's snapshots service.
    pub mod snapshots {
        tonic::include_proto!("containerd.services.snapshots.v1");
    }

    /// containerd's version.
    pub mod version {
        tonic::include_proto!("containerd.services.version.v1");
    }

    /// containerd's plugins.
    pub mod introspection {
        tonic::include_proto!("containerd.services.introspection.v1");
    }

    /// Our own.
    pub mod status {
        tonic::include_proto!("accel.snapshotter.v1");
    }
}

use wire::snapshots as api;

/// How many snapshots one answer of a listing has.
const PAGE: usize = 100;

/// Answers containerd.
#[derive(Debug, Clone)]
pub struct Service(pub Arc<Snapshotter>);

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Store(StoreError::NotFound(_)) => Self::not_found(text),
            Failure::Store(StoreError::Exists(_)) => Self::already_exists(text),
            Failure::Store(StoreError::Invalid(_)) | Failure::Filter(_) => {
                Self::invalid_argument(text)
            }
            Failure::Store(StoreError::State(_)) => Self::failed_precondition(text),
            Failure::NotMounted { .. } => Self::unavailable(text),
            Failure::Store(StoreError::Disk { .. }) | Failure::Io { .. } | Failure::IdMap(_) => {
                tracing::error!(error = text, "a request failed");
                Self::unknown(text)
            }
        }
    }
}

fn parent(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn mounts(mounts: Vec<Mount>) -> Response<api::MountsResponse> {
    let mounts = mounts.into_iter().map(|mount| api::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    });
    Response::new(api::MountsResponse {
        mounts: mounts.collect(),
    })
}

fn timestamp(moment: Moment) -> Option<prost_types::Timestamp> {
    let Moment(since) = moment;
    Some(prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
    })
}

fn info(name: String, snapshot: Snapshot) -> api::Info {
    let kind = match snapshot.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name,
        parent: snapshot.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: timestamp(snapshot.created),
        updated_at: timestamp(snapshot.updated),
        labels: snapshot.labels.into_iter().collect(),
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<api::PrepareRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        self.create(Kind::Active, request.into_inner()).await
    }

    async fn view(
        &self,
        request: Request<api::PrepareRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        self.create(Kind::View, request.into_inner()).await
    }

    async fn mounts(
        &self,
        request: Request<api::KeyRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        Ok(mounts(self.0.mounts(&request.into_inner().key)?))
    }

    async fn commit(&self, request: Request<api::CommitRequest>) -> Result<Response<()>, Status> {
        let api::CommitRequest {
            key, name, labels, ..
        } = request.into_inner();
        let labels = labels.into_iter().collect();
        self.0.commit(key, name, labels).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<api::KeyRequest>) -> Result<Response<()>, Status> {
        self.0.remove(&request.into_inner().key)?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<api::KeyRequest>,
    ) -> Result<Response<api::InfoResponse>, Status> {
        let key = request.into_inner().key;
        let snapshot = self.0.stat(&key)?;
        Ok(Response::new(api::InfoResponse {
            info: Some(info(key, snapshot)),
        }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateRequest>,
    ) -> Result<Response<api::InfoResponse>, Status> {
        let request = request.into_inner();
        let given = request.info.unwrap_or_default();
        let labels = given.labels.into_iter().collect();
        let paths = request.update_mask.unwrap_or_default().paths;
        let snapshot = self.0.update(&given.name, &labels, &paths)?;
        Ok(Response::new(api::InfoResponse {
            info: Some(info(given.name, snapshot)),
        }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<api::ListResponse, Status>> + Send>>;

    async fn list(
        &self,
        request: Request<api::ListRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let found = self.0.walk(&request.into_inner().filters)?;
        let all: Vec<_> = found
            .into_iter()
            .map(|(name, snapshot)| info(name, snapshot))
            .collect();
        let pages: Vec<_> = all
            .chunks(PAGE)
            .map(|page| {
                Ok(api::ListResponse {
                    info: page.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pages))))
    }

    async fn usage(
        &self,
        request: Request<api::KeyRequest>,
    ) -> Result<Response<api::UsageResponse>, Status> {
        let usage = self.0.usage(request.into_inner().key).await?;
        Ok(Response::new(api::UsageResponse {
            size: signed(usage.size),
            inodes: signed(usage.inodes),
        }))
    }

    async fn cleanup(&self, _: Request<api::CleanupRequest>) -> Result<Response<()>, Status> {
        let snapshotter = Arc::clone(&self.0);
        let cleaned = tokio::task::spawn_blocking(move || snapshotter.clean_up()).await;
        cleaned.map_err(|error| Status::internal(error.to_string()))??;
        Ok(Response::new(()))
    }
}

impl Service {
    async fn create(
        &self,
        kind: Kind,
        request: api::PrepareRequest,
    ) -> Result<Response<api::MountsResponse>, Status> {
        let labels = request.labels.into_iter().collect();
        let created = self
            .0
            .create(kind, request.key, parent(request.parent), labels);
        Ok(mounts(created.await?))
    }
}

#[tonic::async_trait]
impl wire::status::status_server::Status for Service {
    async fn get(&self, _: Request<()>) -> Result<Response<wire::status::StatusResponse>, Status> {
        let status = self.0.status()?;
        let json = serde_json::to_string_pretty(&status);
        let json = json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(wire::status::StatusResponse { json }))
    }
}

/// A connection to the gRPC server at a socket, where each request may take so long.
pub async fn connect(
    socket: std::path::PathBuf,
    patience: Duration,
) -> Result<tonic::transport::Channel, tonic::transport::Error> {
    let endpoint = tonic::transport::Endpoint::from_static("http://socket").timeout(patience);
    endpoint
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        }))
        .await
}

/// How long people wait for what the snapshotter says.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What [`ask_status`] can be waited for with, on the caller's thread.
///
/// # Errors
/// The system has no room for it.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    use anyhow::Context as _;
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("cannot start")
}

/// Asks the snapshotter at a socket how it is; gives up after so long.
pub async fn ask_status(
    socket: std::path::PathBuf,
    patience: Duration,
) -> anyhow::Result<crate::status::Status> {
    use anyhow::Context as _;
    let path = socket.display().to_string();
    let ask = async {
        let channel = connect(socket, patience).await.with_context(|| {
            format!("cannot reach the snapshotter at {path}: is `accel-snapshotter serve` running there, and is this root?")
        })?;
        let mut client = wire::status::status_client::StatusClient::new(channel);
        let answer = client
            .get(())
            .await
            .map_err(|status| anyhow::anyhow!("{}", status.message()))?;
        serde_json::from_str(&answer.into_inner().json).context("cannot read the answer")
    };
    match tokio::time::timeout(patience, ask).await {
        Ok(answer) => answer,
        Err(_) => anyhow::bail!(
            "the snapshotter at {path} does not answer within {} s",
            patience.as_secs()
        ),
    }
}
