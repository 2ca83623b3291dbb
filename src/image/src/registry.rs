//! Images in a registry (OCI distribution specification), read only.
//!
//! `oci-client` speaks to the registry on a thread of its own; blobs cross over
//! to the blocking side through a bounded channel, so that the network goes on
//! while the reader works. A connection that breaks within a blob is taken up
//! again where it broke.
//!
//! Credentials are those of `docker login` (`$DOCKER_CONFIG` or
//! `~/.docker/config.json`) or of `podman login`/`skopeo login`; none means
//! anonymous.

use crate::ImageError;
use crate::image::{MAX_MANIFEST, Origin, Start, limit};
use crate::manifest::{ACCEPTED, Pointer};
use accel_oci::{RegistryReference, Version};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use futures_util::StreamExt;
use futures_util::future::{self, Either};
use futures_util::stream::BoxStream;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use std::future::Future;
use std::io::{self, Read};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

/// Pieces of a blob between network and reader; each is some tens of KiB.
const PIECES: usize = 64;
/// How often in a row a blob may break without a byte in between.
const RETRIES: u32 = 4;
const CONNECT: Duration = Duration::from_secs(20);
/// A connection without a byte for so long is broken.
const SILENCE: Duration = Duration::from_secs(60);

/// A repository in a registry and the version that is meant.
pub(crate) struct Registry {
    runtime: Runtime,
    connection: Arc<Connection>,
    source: RegistryReference,
    /// Becomes true when nothing is wanted any more.
    stop: watch::Sender<bool>,
}

/// What a download needs.
struct Connection {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    plain_http: bool,
}

impl Registry {
    pub fn open(source: &RegistryReference, plain_http: bool) -> Result<Self, ImageError> {
        // Ring for everything; a provider that somebody installed before serves
        // as well, so the result does not matter.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|error| ImageError::Setup(error.to_string()))?;
        let client = Client::try_from(ClientConfig {
            protocol: match plain_http {
                true => ClientProtocol::Http,
                false => ClientProtocol::Https,
            },
            connect_timeout: Some(CONNECT),
            read_timeout: Some(SILENCE),
            user_agent: concat!("image-accel/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
        .map_err(|error| ImageError::Setup(chain(&error)))?;
        let (registry, repository) = (source.registry.clone(), repository(source));
        let reference = match &source.version {
            Version::Tag(tag) => Reference::with_tag(registry, repository, tag.clone()),
            Version::Digest(digest) => {
                Reference::with_digest(registry, repository, digest.to_string())
            }
        };
        let opened = Self {
            runtime,
            connection: Arc::new(Connection {
                client,
                reference,
                auth: credentials(&source.registry),
                plain_http,
            }),
            source: source.clone(),
            stop: watch::channel(false).0,
        };
        opened.log_in()?;
        Ok(opened)
    }

    /// Asks for a token, if the registry wants one. The client would do it by
    /// itself, but would not tell why it failed.
    fn log_in(&self) -> Result<(), ImageError> {
        let connection = &self.connection;
        let auth = connection.client.auth(
            &connection.reference,
            &connection.auth,
            RegistryOperation::Pull,
        );
        let authorised = self.runtime.block_on(auth);
        authorised
            .map(drop)
            .map_err(|error| connection.error("access", &error))
    }

    fn fetch(&self, reference: &Reference, what: &str) -> Result<Vec<u8>, ImageError> {
        let connection = &self.connection;
        let pull = connection
            .client
            .pull_manifest_raw(reference, &connection.auth, &ACCEPTED);
        let (bytes, _) = self
            .runtime
            .block_on(pull)
            .map_err(|error| connection.error(what, &error))?;
        limit(what, bytes.len() as u64, MAX_MANIFEST)?;
        Ok(bytes.to_vec())
    }
}

/// On Docker Hub, names without a slash are short for `library/…`.
fn repository(source: &RegistryReference) -> String {
    if source.registry == "docker.io" && !source.repository.contains('/') {
        return format!("library/{}", source.repository);
    }
    source.repository.clone()
}

impl Origin for Registry {
    fn start(&self) -> Result<Start, ImageError> {
        let what = match &self.source.version {
            Version::Tag(tag) => format!("the tag {tag:?} of {:?}", self.source.repository),
            Version::Digest(digest) => {
                format!("the manifest {digest} of {:?}", self.source.repository)
            }
        };
        Ok(Start::Document {
            json: self.fetch(&self.connection.reference, &what)?,
            expected: match self.source.version {
                Version::Tag(_) => None,
                Version::Digest(digest) => Some(digest),
            },
        })
    }

    fn manifest(&self, pointer: &Pointer) -> Result<Vec<u8>, ImageError> {
        let digest = pointer.digest.to_string();
        let what = format!("the manifest {digest} of {:?}", self.source.repository);
        let reference = &self.connection.reference;
        self.fetch(&reference.clone_with_digest(digest), &what)
    }

    fn blob(&self, what: &str, pointer: &Pointer) -> Result<Box<dyn Read + Send>, ImageError> {
        if pointer.size == 0 {
            return Ok(Box::new(io::empty()));
        }
        let download = Download {
            connection: Arc::clone(&self.connection),
            digest: pointer.digest.to_string(),
            what: what.to_owned(),
            size: pointer.size,
            offset: 0,
        };
        // The first request here, so that a missing blob is an error at once.
        let stop = self.stop.subscribe();
        let stream = self
            .runtime
            .block_on(unless_stopped(stop.clone(), download.request()));
        let stream = match stream {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => return Err(download.connection.error(what, &error)),
            None => return Err(ImageError::Stopped),
        };
        let (sender, pieces) = mpsc::channel(PIECES);
        self.runtime.spawn(async move {
            let stopped = sender.clone();
            let done = unless_stopped(stop, download.run(stream, sender)).await;
            if done.is_none() {
                // Nobody reads what is in front of it if there is no room.
                let _ = stopped.try_send(Err(io::Error::other(ImageError::Stopped)));
            }
        });
        Ok(Box::new(Blob {
            pieces,
            piece: Piece::default(),
            used: 0,
        }))
    }

    fn stop(&self) {
        self.stop.send_replace(true);
    }
}

/// What `work` gives, or `None` as soon as `stop` is true.
async fn unless_stopped<T>(
    mut stop: watch::Receiver<bool>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let stopped = pin!(stop.wait_for(|stop| *stop));
    match future::select(stopped, pin!(work)).await {
        Either::Left(_) => None,
        Either::Right((done, _)) => Some(done),
    }
}

/// Bytes that came in one piece.
type Piece = bytes::Bytes;
type Pieces = BoxStream<'static, io::Result<Piece>>;

/// One blob on its way from the network into the channel.
struct Download {
    connection: Arc<Connection>,
    digest: String,
    what: String,
    /// What the descriptor says.
    size: u64,
    /// Bytes that went into the channel.
    offset: u64,
}

impl Download {
    /// Asks for what is missing. Always with a range: a whole response the
    /// client would hash, which whoever reads the blob does anyway.
    async fn request(&self) -> Result<Pieces, OciDistributionError> {
        let connection = &self.connection;
        let (client, reference) = (&connection.client, &connection.reference);
        client
            .store_auth_if_needed(reference.resolve_registry(), &connection.auth)
            .await;
        let digest = self.digest.as_str();
        let response = client.pull_blob_stream_partial(reference, digest, self.offset, None);
        match response.await? {
            BlobResponse::Partial(partial) => Ok(partial.stream),
            BlobResponse::Full(full) => Ok(skip(full.stream, self.offset)),
        }
    }

    async fn run(mut self, mut stream: Pieces, sender: mpsc::Sender<io::Result<Piece>>) {
        let mut broken = 0;
        loop {
            let error = match self.pass_on(stream, &sender, &mut broken).await {
                Ok(()) => return,
                Err(error) => error,
            };
            broken += 1;
            if broken > RETRIES {
                let _ = sender.send(Err(error)).await;
                return;
            }
            tracing::warn!(what = self.what, offset = self.offset, %error, "asking again");
            stream = loop {
                tokio::time::sleep(Duration::from_millis(250 << broken)).await;
                match self.request().await {
                    Ok(stream) => break stream,
                    Err(_) if broken < RETRIES => broken += 1,
                    Err(error) => {
                        let error = self.connection.error(&self.what, &error);
                        let _ = sender.send(Err(io::Error::other(error))).await;
                        return;
                    }
                }
            };
        }
    }

    /// Passes a response on until it ends (`Ok`, also if the reader is gone or
    /// the registry gave too little or too much) or breaks.
    async fn pass_on(
        &mut self,
        mut stream: Pieces,
        sender: &mpsc::Sender<io::Result<Piece>>,
        broken: &mut u32,
    ) -> io::Result<()> {
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|error| io::Error::other(chain(&error)))?;
            *broken = 0;
            self.offset += piece.len() as u64;
            let more = self.offset > self.size;
            let piece = if more { Err(self.misfit()) } else { Ok(piece) };
            if sender.send(piece).await.is_err() || more {
                return Ok(());
            }
        }
        if self.offset < self.size {
            let _ = sender.send(Err(self.misfit())).await;
        }
        Ok(())
    }

    fn misfit(&self) -> io::Error {
        let Self { what, size, .. } = self;
        let registry = self.connection.reference.registry();
        let kind = io::ErrorKind::UnexpectedEof;
        if self.offset > *size {
            let text = format!("{registry} gave more than the {size} bytes of {what}");
            return io::Error::new(io::ErrorKind::InvalidData, text);
        }
        let text = format!(
            "{registry} gave {} of the {size} bytes of {what}",
            self.offset
        );
        io::Error::new(kind, text)
    }
}

/// `stream` without its first `bytes`.
fn skip(stream: Pieces, bytes: u64) -> Pieces {
    let mut rest = bytes;
    stream
        .map(move |piece| {
            let mut piece = piece?;
            let cut = usize::try_from(rest).map_or(piece.len(), |rest| rest.min(piece.len()));
            rest -= cut as u64;
            Ok(piece.split_off(cut))
        })
        .boxed()
}

/// The reader's end of a blob.
struct Blob {
    pieces: mpsc::Receiver<io::Result<Piece>>,
    piece: Piece,
    used: usize,
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.used == self.piece.len() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(piece) => (self.piece, self.used) = (piece?, 0),
            }
        }
        let rest = &self.piece[self.used..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.used += length;
        Ok(length)
    }
}

impl Connection {
    /// What the registry's answer means, and what to do about it.
    fn error(&self, what: &str, error: &OciDistributionError) -> ImageError {
        use OciDistributionError as E;
        let logged_in = matches!(self.auth, RegistryAuth::Basic(..));
        let denied = if logged_in {
            "the registry refuses the credentials of your login; log in again, or ask for access"
        } else {
            "the registry wants a login: use docker login or skopeo login for this registry first"
        };
        let why = match error {
            E::UnauthorizedError { .. } => format!("{denied} (401)"),
            E::AuthenticationFailure(reason) => format!("{denied} ({})", first_line(reason)),
            E::RegistryError { envelope, .. } => {
                let codes: Vec<_> = envelope.errors.iter().map(|e| &e.code).collect();
                let said = envelope.errors.iter().map(|e| e.message.clone());
                let said = said.collect::<Vec<_>>().join("; ");
                let absent = |code: &&OciErrorCode| {
                    use OciErrorCode as C;
                    matches!(
                        code,
                        C::ManifestUnknown | C::NameUnknown | C::NotFound | C::BlobUnknown
                    )
                };
                if codes.iter().any(|c| matches!(c, OciErrorCode::Denied)) {
                    format!("{denied} (403, it says {said:?})")
                } else if codes.iter().copied().any(|c| absent(&c)) {
                    format!("the registry does not have it (404, it says {said:?})")
                } else {
                    format!("the registry says {said:?}")
                }
            }
            E::ServerError { code: 403, .. } => format!("{denied} (403)"),
            E::ServerError { code: 404, .. } => "the registry does not have it (404)".to_owned(),
            E::ServerError { code, message, .. } => {
                format!("the registry answers {code} ({})", first_line(message))
            }
            E::RequestError(error) => {
                let text = chain(error);
                let hint = match self.plain_http {
                    false if text.contains("InvalidContentType") => {
                        "; it does not speak TLS: --plain-http, if you trust the network"
                    }
                    _ => "",
                };
                format!("{text}{hint}")
            }
            other => chain(other),
        };
        ImageError::Registry {
            registry: self.reference.registry().to_owned(),
            what: what.to_owned(),
            why,
        }
    }
}

/// An error with everything below it: HTTP clients hide the reason deep down.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        below = error.source();
    }
    text
}

fn first_line(text: &str) -> String {
    let line = text.trim().lines().next().unwrap_or("no reason given");
    line.chars().take(200).collect()
}

/// The credentials that the user has for `registry`.
fn credentials(registry: &str) -> RegistryAuth {
    let key = match registry {
        "docker.io" => "https://index.docker.io/v1/",
        other => other,
    };
    for (tool, found) in [
        ("docker", docker_credential::get_credential(key)),
        ("podman", docker_credential::get_podman_credential(registry)),
    ] {
        match found {
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                return RegistryAuth::Basic(user, password);
            }
            Ok(DockerCredential::IdentityToken(_)) => {
                tracing::warn!(tool, registry, "identity tokens are not supported");
            }
            Err(
                CredentialRetrievalError::ConfigNotFound
                | CredentialRetrievalError::ConfigReadError
                | CredentialRetrievalError::NoCredentialConfigured,
            ) => {}
            Err(error) => tracing::warn!(tool, registry, ?error, "cannot read the credentials"),
        }
    }
    RegistryAuth::Anonymous
}
