//! Images in a registry (OCI distribution specification): reading; [`push`] and [`remove`] have the rest.
//!
//! The network has a thread of its own; blobs cross over to the blocking side through
//! a bounded channel, so that it goes on while the reader works. A connection that
//! breaks within a blob is taken up again where it broke.

mod failure;
mod hosts;
mod hosts_file;
mod http;
mod login;
mod login_check;
mod push;
mod remove;

use self::failure::{Failure, pause, told};
use self::hosts::Capabilities;
use self::http::Http;
use self::login::Login;
pub use self::login_check::{check_login, logins};
pub use self::remove::Untagged;
use crate::image::{MAX_MANIFEST, Origin, Start};
use crate::manifest::{ACCEPTED, Pointer};
use crate::{ImageError, OpenOptions, Problem};
use accel_oci::{RegistryReference, Version};
use futures_util::StreamExt;
use futures_util::future::{self, Either};
use futures_util::stream::BoxStream;
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use std::future::Future;
use std::io::{self, Read};
use std::pin::pin;
use std::sync::Arc;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

/// Pieces of a blob between network and reader; each is some tens of KiB.
const PIECES: usize = 64;
/// How often in a row an answer may break without a byte in between.
const RETRIES: u32 = 4;

/// A repository in a registry and the version that is meant.
pub(crate) struct Registry {
    runtime: Runtime,
    /// Who may be asked, in this order; the registry itself is the last.
    hosts: Arc<[Http]>,
    source: RegistryReference,
    /// Becomes true when nothing is wanted any more.
    stop: watch::Sender<bool>,
}

impl Registry {
    /// For reading.
    pub fn open(source: &RegistryReference, options: &OpenOptions) -> Result<Self, ImageError> {
        Self::new(source, options, false)
    }

    /// For writing.
    pub fn open_for_push(
        source: &RegistryReference,
        options: &OpenOptions,
    ) -> Result<Self, ImageError> {
        Self::new(source, options, true)
    }

    fn new(
        source: &RegistryReference,
        options: &OpenOptions,
        push: bool,
    ) -> Result<Self, ImageError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("registry")
            .enable_all()
            .build()
            .map_err(|error| ImageError::Setup(error.to_string()))?;
        let (registry, repository) = (&source.registry, &source.repository);
        let hosts = hosts::hosts(registry, options.hosts.as_deref(), options.plain_http)?;
        let mut pushed_to = hosts.iter().position(|host| host.can.push && push);
        let hosts = hosts.into_iter().enumerate().map(|(number, host)| {
            let meant = host.itself || pushed_to.take_if(|at| *at == number).is_some();
            let login = match host.itself {
                true => Login::new(registry, options, meant),
                false => Login::new(&http::address(&host.base), options, meant),
            };
            Http::new(registry, repository, host, login)
        });
        Ok(Self {
            runtime,
            hosts: hosts.collect::<Result<_, _>>()?,
            source: source.clone(),
            stop: watch::channel(false).0,
        })
    }

    /// A manifest or index by tag or digest.
    fn fetch(&self, version: &str, what: &str, tag: bool) -> Result<Vec<u8>, ImageError> {
        let path = format!("manifests/{version}");
        let mut failures = Vec::new();
        let able = |can: Capabilities| if tag { can.resolve } else { can.pull };
        for host in asked(&self.hosts, able) {
            let host = &self.hosts[host];
            match self.runtime.block_on(manifest(host, &path)) {
                Ok(json) => return Ok(json),
                Err(failure) => failures.push((host, failure)),
            }
        }
        Err(self.error(what, &failures))
    }

    fn error(&self, what: &str, failures: &[(&Http, Failure)]) -> ImageError {
        nobody_gave(&self.source.registry, what, failures)
    }
}

/// Which hosts to ask for what needs an ability. One that could not be reached is not
/// asked again while there are others.
fn asked(hosts: &[Http], able: impl Fn(Capabilities) -> bool) -> Vec<usize> {
    let able: Vec<_> = (0..hosts.len()).filter(|at| able(hosts[*at].can)).collect();
    let alive: Vec<_> = able
        .iter()
        .copied()
        .filter(|at| !hosts[*at].has_failed())
        .collect();
    if alive.is_empty() { able } else { alive }
}

async fn manifest(http: &Http, path: &str) -> Result<Vec<u8>, Failure> {
    let accept = ACCEPTED.join(", ");
    let most = usize::try_from(MAX_MANIFEST).unwrap_or(usize::MAX);
    let mut broken = 0;
    loop {
        let response = http.get(path, &accept, 0).await?;
        match http::read(response, most).await {
            Err(Failure::Connection(_)) if broken < RETRIES => {
                broken += 1;
                tokio::time::sleep(pause(broken)).await;
            }
            result => return result,
        }
    }
}

/// The error when nobody gave `what`: the last one's reason, then the others'.
fn nobody_gave(registry: &str, what: &str, failures: &[(&Http, Failure)]) -> ImageError {
    let mut why = match failures.last() {
        Some((host, failure)) => host.explain(failure),
        None => "hosts.toml has no host with the capability for it".to_owned(),
    };
    let (name, mirrors) = match failures {
        [mirrors @ .., (host, _)] => (host.registry.as_str(), mirrors),
        [] => (registry, &[][..]),
    };
    for (mirror, failure) in mirrors {
        why += &format!(
            "; before that, {}: {}",
            mirror.registry,
            mirror.explain(failure)
        );
    }
    ImageError::Registry {
        registry: name.to_owned(),
        what: what.to_owned(),
        why,
        problem: failures
            .last()
            .map_or(Problem::Other, |(host, failure)| host.problem(failure)),
    }
}

impl Origin for Registry {
    fn start(&self) -> Result<Start, ImageError> {
        let repository = &self.source.repository;
        let (version, what, expected) = match &self.source.version {
            Version::Tag(tag) => (
                tag.clone(),
                format!("the tag {tag:?} of {repository:?}"),
                None,
            ),
            Version::Digest(digest) => (
                digest.to_string(),
                format!("the manifest {digest} of {repository:?}"),
                Some(*digest),
            ),
        };
        let json = self.fetch(&version, &what, expected.is_none())?;
        Ok(Start::Document { json, expected })
    }

    fn manifest(&self, pointer: &Pointer) -> Result<Vec<u8>, ImageError> {
        let digest = pointer.digest.to_string();
        let what = format!("the manifest {digest} of {:?}", self.source.repository);
        self.fetch(&digest, &what, false)
    }

    fn blob(&self, what: &str, pointer: &Pointer) -> Result<Box<dyn Read + Send>, ImageError> {
        if pointer.size == 0 {
            return Ok(Box::new(io::empty()));
        }
        let mut rest = asked(&self.hosts, |can| can.pull);
        if rest.is_empty() {
            return Err(self.error(what, &[]));
        }
        let mut download = Download {
            hosts: Arc::clone(&self.hosts),
            host: rest.remove(0),
            rest,
            digest: pointer.digest.to_string(),
            urls: pointer.urls.clone(),
            elsewhere: None,
            what: what.to_owned(),
            size: pointer.size,
            offset: 0,
        };
        // The first request here, so that a missing blob is an error at once.
        let stop = self.stop.subscribe();
        let stream = self
            .runtime
            .block_on(unless_stopped(stop.clone(), download.first_request()));
        let stream = match stream {
            Some(Ok(stream)) => stream,
            Some(Err(failures)) => {
                let failures = failures.into_iter();
                let failures: Vec<_> = failures.map(|(at, why)| (&self.hosts[at], why)).collect();
                return Err(self.error(what, &failures));
            }
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
    hosts: Arc<[Http]>,
    /// Which of them is asked.
    host: usize,
    /// Which ones are left to be asked.
    rest: Vec<usize>,
    digest: String,
    /// Where it may lie besides the registry.
    urls: Vec<String>,
    /// Which of those it comes from.
    elsewhere: Option<String>,
    what: String,
    /// What the descriptor says.
    size: u64,
    /// Bytes that went into the channel.
    offset: u64,
}

impl Download {
    fn http(&self) -> &Http {
        &self.hosts[self.host]
    }

    /// Goes on to the next host, if there is one.
    fn next_host(&mut self) -> bool {
        if self.rest.is_empty() {
            return false;
        }
        self.host = self.rest.remove(0);
        true
    }

    /// Asks the hosts one after the other, and what else the manifest names if they do
    /// not have it. Fails with what each host said.
    async fn first_request(&mut self) -> Result<Pieces, Vec<(usize, Failure)>> {
        let mut failures = Vec::new();
        loop {
            match self.request().await {
                Ok(pieces) => return Ok(pieces),
                Err(failure) => failures.push((self.host, failure)),
            }
            if !self.next_host() {
                break;
            }
        }
        for url in self.urls.clone() {
            match failures.last() {
                Some((_, failure)) if failure.is_absent() || self.elsewhere.is_some() => {}
                _ => break,
            }
            self.elsewhere = Some(url);
            match self.request().await {
                Ok(pieces) => return Ok(pieces),
                Err(failure) => failures = vec![(self.host, failure)],
            }
        }
        Err(failures)
    }

    /// Asks for what is missing.
    async fn request(&self) -> Result<Pieces, Failure> {
        let response = match &self.elsewhere {
            None => {
                let path = format!("blobs/{}", self.digest);
                self.http().get(&path, "", self.offset).await?
            }
            Some(url) => self.http().get_elsewhere(url, self.offset).await?,
        };
        let skipped = match response.status() {
            StatusCode::PARTIAL_CONTENT => start_of_range(&response).unwrap_or(self.offset),
            _ => 0,
        };
        let missing = self.offset.checked_sub(skipped).ok_or_else(|| {
            let text = format!(
                "it gives the bytes from {skipped} on, wanted were those from {} on",
                self.offset
            );
            Failure::Connection(text)
        })?;
        let stream = response
            .bytes_stream()
            .map(|piece| piece.map_err(|error| io::Error::other(told(&error))));
        Ok(skip(stream.boxed(), missing))
    }

    async fn run(mut self, mut stream: Pieces, sender: mpsc::Sender<io::Result<Piece>>) {
        let mut broken = 0;
        loop {
            let error = match self.pass_on(stream, &sender, &mut broken).await {
                Ok(()) => return,
                Err(error) => error,
            };
            broken += 1;
            if broken > RETRIES && !self.next_host() {
                let text = format!(
                    "the connection to {} broke {broken} times in a row after {} of {} bytes of {}: {error}; look at the network, then start anew",
                    self.http().registry,
                    self.offset,
                    self.size,
                    self.what,
                );
                let _ = sender.send(Err(io::Error::other(text))).await;
                return;
            }
            let (what, offset) = (&self.what, self.offset);
            tracing::warn!(what, offset, %error, "the connection broke; asking again");
            tokio::time::sleep(pause(broken)).await;
            stream = loop {
                match self.request().await {
                    Ok(stream) => break stream,
                    Err(failure) => {
                        let (http, what) = (&self.hosts[self.host], self.what.clone());
                        let error = nobody_gave(&http.registry, &what, &[(http, failure)]);
                        if self.next_host() {
                            tracing::warn!(%error, "asking the next host");
                            continue;
                        }
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
            let piece = piece?;
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
        let registry = &self.http().registry;
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

/// Which byte a partial answer begins with, if it says so.
fn start_of_range(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .parse()
        .ok()
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
