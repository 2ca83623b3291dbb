//! Where a registry is to be asked, and how: what `hosts.toml` says.
//!
//! The files are containerd's (its documentation, "Registry Configuration"): in a
//! directory per registry, called `HOST_PORT_` or `HOST:PORT` (`HOST` without a port),
//! else `_default`, below a directory that is usually `/etc/containerd/certs.d`. Hosts are
//! asked in the file's order, the registry itself (`server`) last. A directory without
//! `hosts.toml` holds certificates as docker has them in `/etc/docker/certs.d`:
//! `*.crt` are authorities, `NAME.cert` with `NAME.key` is the client's.
//!
//! What containerd would pass over silently is an error here, or a warning: a mirror
//! with a misspelt field is a mirror that nobody uses.

use super::hosts_file;
use crate::{ImageError, Problem};
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where containerd has them, and docker.
const CONTAINERD: &str = "/etc/containerd/certs.d";
const DOCKER: &str = "/etc/docker/certs.d";
/// No such file is longer.
const MAX_FILE: u64 = 1 << 20;

/// A host that may be asked in a registry's place, or the registry itself.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// What repositories' paths are appended to; ends with a slash.
    pub base: Url,
    /// Whether it is the registry itself.
    pub itself: bool,
    pub can: Capabilities,
    /// Certificates of authorities, PEM, and their files.
    pub authorities: Vec<(PathBuf, Vec<u8>)>,
    /// The client's certificate and key, PEM, and the certificate's file.
    pub client: Option<(PathBuf, Vec<u8>)>,
    pub skip_verify: bool,
    /// Sent along with every request.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub dial_timeout: Option<Duration>,
}

/// What a host is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Manifests and blobs by digest.
    pub pull: bool,
    /// What a tag points to.
    pub resolve: bool,
    pub push: bool,
}

impl Capabilities {
    pub const ALL: Self = Self {
        pull: true,
        resolve: true,
        push: true,
    };
}

/// The hosts for `registry` (`HOST[:PORT]`), in the order in which to ask them.
///
/// `directory` is what the user names; without, the usual ones count. `plain_http` says
/// how the registry is spoken to where no file says so.
pub(super) fn hosts(
    registry: &str,
    directory: Option<&Path>,
    plain_http: bool,
) -> Result<Vec<Host>, ImageError> {
    let found = match directory {
        Some(directory) => {
            if !directory.is_dir() {
                return Err(wrong(
                    directory,
                    "--hosts-dir",
                    "there is no such directory",
                ));
            }
            find(directory, registry)
        }
        None => find(Path::new(CONTAINERD), registry).or_else(|| {
            find(Path::new(DOCKER), registry).filter(|found| !found.ends_with(DEFAULT))
        }),
    };
    let itself = Host::new(default_server(registry), plain_http, registry)?;
    let Some(found) = found else {
        return Ok(vec![itself]);
    };
    let path = found.join("hosts.toml");
    match read(&path) {
        Ok(text) => hosts_file::parse(&path, &text, registry, itself),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(vec![with_certificates(&found, itself)?])
        }
        Err(error) => Err(unreadable(&path, "", &error)),
    }
}

const DEFAULT: &str = "_default";

/// The directory for `registry`.
fn find(directory: &Path, registry: &str) -> Option<PathBuf> {
    let escaped = registry
        .rsplit_once(':')
        .map(|(host, port)| format!("{host}_{port}_"));
    let names = [escaped, Some(registry.to_owned()), Some(DEFAULT.to_owned())];
    let mut paths = names.into_iter().flatten().map(|name| directory.join(name));
    paths.find(|path| path.is_dir())
}

/// Docker Hub is elsewhere.
fn default_server(registry: &str) -> &str {
    match registry {
        "docker.io" => "registry-1.docker.io",
        other => other,
    }
}

pub(super) fn wrong(path: &Path, field: &str, why: impl Into<String>) -> ImageError {
    ImageError::Hosts {
        path: path.to_owned(),
        field: field.to_owned(),
        why: why.into(),
    }
}

fn unreadable(path: &Path, field: &str, error: &io::Error) -> ImageError {
    wrong(path, field, error.to_string())
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Look before opening: a FIFO would block.
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        let text = "it is not a regular file of at most 1 MiB";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    fs::read(path)
}

impl Host {
    /// A host without anything special.
    fn new(host: &str, plain_http: bool, registry: &str) -> Result<Self, ImageError> {
        let scheme = if plain_http { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2/"));
        Ok(Self {
            base: base.map_err(|error| ImageError::Registry {
                registry: registry.to_owned(),
                what: "anything".to_owned(),
                why: format!("{host:?} is no host: {error}"),
                problem: Problem::Other,
            })?,
            itself: true,
            can: Capabilities::ALL,
            authorities: Vec::new(),
            client: None,
            skip_verify: false,
            headers: Vec::new(),
            dial_timeout: None,
        })
    }
}

/// Adds the certificates that lie in a directory without `hosts.toml`.
fn with_certificates(directory: &Path, mut host: Host) -> Result<Host, ImageError> {
    let names = fs::read_dir(directory).and_then(|entries| {
        entries
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<Vec<_>>>()
    });
    let mut paths = names.map_err(|error| unreadable(directory, "", &error))?;
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.authorities.push(pem(&path, "", &path)?),
            Some("cert") => {
                let key = path.with_extension("key");
                host.client = Some(client(&path, "", &path, Some(&key))?);
            }
            _ => {}
        }
    }
    Ok(host)
}

/// Reads a file of certificates that `field` of the file `path` names.
pub(super) fn pem(path: &Path, field: &str, file: &Path) -> Result<(PathBuf, Vec<u8>), ImageError> {
    let text =
        read(file).map_err(|error| wrong(path, field, format!("cannot read {file:?}: {error}")))?;
    let found = reqwest::Certificate::from_pem_bundle(&text);
    if !found.is_ok_and(|found| !found.is_empty()) {
        return Err(wrong(
            path,
            field,
            format!("{file:?} has no certificate in PEM"),
        ));
    }
    Ok((file.to_owned(), text))
}

/// Reads the client's certificate, and its key if that is in another file.
pub(super) fn client(
    path: &Path,
    field: &str,
    certificate: &Path,
    key: Option<&Path>,
) -> Result<(PathBuf, Vec<u8>), ImageError> {
    let (_, mut text) = pem(path, field, certificate)?;
    if let Some(key) = key {
        text.push(b'\n');
        text.extend(
            read(key)
                .map_err(|error| wrong(path, field, format!("cannot read {key:?}: {error}")))?,
        );
    }
    if reqwest::Identity::from_pem(&text).is_err() {
        let file = key.unwrap_or(certificate);
        return Err(wrong(path, field, format!("{file:?} has no key in PEM")));
    }
    Ok((certificate.to_owned(), text))
}
