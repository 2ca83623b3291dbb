//! Pushing: blobs, mounted from another repository where the registry can, then a
//! manifest.

use super::Registry;
use super::failure::{Failure, pause};
use super::http::Http;
use crate::accelerated::Document;
use crate::image::{Image, Layer};
use crate::{ImageError, Problem};
use accel_oci::{Digest, RegistryReference, Version};
use bytes::Bytes;
use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Response, StatusCode, Url};
use std::io::{self, Read};
use tokio::sync::mpsc;

/// Bytes that are read of a blob at a time.
const PIECE: usize = 256 << 10;
/// Pieces between reader and network.
const PIECES: usize = 16;
/// How often a blob is sent, each time from its beginning.
const ATTEMPTS: u32 = 4;

/// What became of an upload that was begun.
enum Begun {
    /// The registry has the blob already.
    Mounted,
    /// The blob is to be sent there.
    Upload(Url),
}

impl Registry {
    /// Tries the right to push: begins an upload and cancels it.
    pub(crate) fn check_push(&self) -> Result<(), ImageError> {
        let http = self.pushed_to()?;
        let check = async {
            if let Begun::Upload(url) = begin(http, &[]).await? {
                // What is not cancelled the registry drops after a while.
                let _ = http.ask(|client| client.delete(url.clone())).await;
            }
            Ok(())
        };
        let checked = self.runtime.block_on(check);
        checked.map_err(|failure: Failure| {
            http.push_error(&format!("to {:?}", self.source.repository), &failure)
        })
    }

    /// Pushes an image's config.
    pub(crate) fn push_config(&self, digest: Digest, json: &[u8]) -> Result<(), ImageError> {
        let http = self.pushed_to()?;
        let json = Bytes::copy_from_slice(json);
        let size = json.len() as u64;
        let push = send(http, digest, size, || Body::from(json.clone()));
        let pushed = self.runtime.block_on(push);
        pushed.map_err(|failure| http.push_error(&format!("the config {digest}"), &failure))
    }

    /// Sees to it that the repository has a layer: it is there, or can be mounted
    /// from the repository `from`, or is copied.
    pub(crate) fn push_layer(
        &self,
        image: &Image,
        layer: &Layer,
        from: Option<&RegistryReference>,
    ) -> Result<(), ImageError> {
        let digest = layer.digest;
        let what = format!("the layer {digest}");
        let http = self.pushed_to()?;
        let error = |failure: Failure| http.push_error(&what, &failure);
        if self.runtime.block_on(has(http, digest)).map_err(error)? {
            return Ok(());
        }
        if let Some(from) = from {
            let text = digest.to_string();
            let query = [("mount", text.as_str()), ("from", &from.repository)];
            // Whatever the reason is why it cannot: then it is copied.
            match self.runtime.block_on(begin(http, &query)) {
                Ok(Begun::Mounted) => return Ok(()),
                Ok(Begun::Upload(url)) => {
                    let cancel = http.ask(|client| client.delete(url.clone()));
                    let _ = self.runtime.block_on(cancel);
                }
                Err(failure) => {
                    let why = http.explain(&failure);
                    tracing::debug!(%digest, why, "the registry does not mount the layer");
                }
            }
        }
        std::thread::scope(|scope| {
            let body = || {
                let (sender, receiver) = mpsc::channel(PIECES);
                scope.spawn(move || pump(|| image.open_layer(layer), &sender));
                Body::wrap_stream(stream::unfold(receiver, |mut receiver| async move {
                    receiver.recv().await.map(|piece| (piece, receiver))
                }))
            };
            self.runtime.block_on(send(http, digest, layer.size, body))
        })
        .map_err(error)
    }

    /// Pushes a manifest or index under the tag that was opened.
    pub(crate) fn push_tagged(&self, document: &Document) -> Result<(), ImageError> {
        let version = match &self.source.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(digest) => digest.to_string(),
        };
        self.push_document(&version, document, &format!("the tag {version:?}"))
    }

    /// Pushes a manifest without a tag.
    pub(crate) fn push_by_digest(&self, document: &Document) -> Result<(), ImageError> {
        let digest = document.digest.to_string();
        self.push_document(&digest, document, &format!("the manifest {digest}"))
    }

    fn push_document(
        &self,
        version: &str,
        document: &Document,
        what: &str,
    ) -> Result<(), ImageError> {
        let http = self.pushed_to()?;
        let json = Bytes::copy_from_slice(&document.json);
        let push = async {
            let url = http.url(&format!("manifests/{version}"))?;
            http.ask(|client| {
                let request = client.put(url.clone());
                let request = request.header(CONTENT_TYPE, document.media_type);
                request.body(json.clone())
            })
            .await
        };
        let pushed = self.runtime.block_on(push);
        pushed
            .map(drop)
            .map_err(|failure| http.push_error(what, &failure))
    }

    /// The host that is pushed to: the first that takes pushes.
    pub(super) fn pushed_to(&self) -> Result<&Http, ImageError> {
        let mut hosts = self.hosts.iter();
        hosts
            .find(|host| host.can.push)
            .ok_or_else(|| ImageError::Push {
                registry: self.source.registry.clone(),
                what: format!("to {:?}", self.source.repository),
                why: "hosts.toml has no host with the capability \"push\" for it".to_owned(),
                problem: Problem::Other,
            })
    }
}

/// Whether the repository has a blob.
async fn has(http: &Http, digest: Digest) -> Result<bool, Failure> {
    let url = http.url(&format!("blobs/{digest}"))?;
    match http.ask(|client| client.head(url.clone())).await {
        Ok(_) => Ok(true),
        Err(failure) if failure.is_absent() => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// Begins an upload.
async fn begin(http: &Http, query: &[(&str, &str)]) -> Result<Begun, Failure> {
    let mut url = http.url("blobs/uploads/")?;
    if !query.is_empty() {
        url.query_pairs_mut().extend_pairs(query);
    }
    let response = http
        .ask(|client| client.post(url.clone()).header(CONTENT_LENGTH, 0))
        .await?;
    match response.status() {
        StatusCode::CREATED => Ok(Begun::Mounted),
        _ => location(&response).map(Begun::Upload),
    }
}

/// Where an answer sends us.
fn location(response: &Response) -> Result<Url, Failure> {
    let header = response.headers().get(LOCATION);
    let text = header.and_then(|value| value.to_str().ok());
    text.and_then(|text| response.url().join(text).ok())
        .ok_or_else(|| Failure::Connection("it does not say where to upload".to_owned()))
}

/// Sends a blob.
async fn send(
    http: &Http,
    digest: Digest,
    size: u64,
    body: impl Fn() -> Body,
) -> Result<(), Failure> {
    let mut attempt = 0;
    loop {
        let Begun::Upload(mut url) = begin(http, &[]).await? else {
            return Ok(());
        };
        url.query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        // Not again to the same address: what broke off may be of no use any more.
        let sent = http
            .ask_once(|client| {
                client
                    .put(url.clone())
                    .header(CONTENT_LENGTH, size)
                    .header(CONTENT_TYPE, "application/octet-stream")
                    .body(body())
            })
            .await;
        attempt += 1;
        match sent {
            Ok(_) => return Ok(()),
            // Not known: the registry has given up what broke off before.
            Err(failure) if attempt < ATTEMPTS && (failure.may_pass() || failure.is_absent()) => {
                tracing::warn!(%digest, why = http.explain(&failure), "sending it again");
                tokio::time::sleep(pause(attempt)).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Passes on what is read, until the other side hangs up.
fn pump(
    open: impl FnOnce() -> Result<Box<dyn Read + Send>, ImageError>,
    sender: &mpsc::Sender<io::Result<Bytes>>,
) {
    let mut from = match open() {
        Ok(from) => from,
        Err(error) => {
            let _ = sender.blocking_send(Err(io::Error::other(error)));
            return;
        }
    };
    let mut buffer = vec![0; PIECE];
    loop {
        let piece = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => Ok(Bytes::copy_from_slice(&buffer[..read])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
        let failed = piece.is_err();
        if sender.blocking_send(piece).is_err() || failed {
            return;
        }
    }
}
