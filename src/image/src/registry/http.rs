//! Asking a registry: logging in when it wants that, asking again when that may
//! help, and saying why it did not.
//!
//! A registry that refuses a request names in `WWW-Authenticate` what it wants: the
//! password itself (Basic), or a token that another server gives for it (Bearer;
//! distribution, "Token Authentication Specification"). A token is asked for once
//! and used until it is refused, which is when it has expired.
//!
//! What may pass is tried again, with growing pauses: broken connections, 408, 429
//! and 5xx. Where the registry says how long to wait (`Retry-After`), that counts.
//! A registry that never answered is not asked twice: it is more likely the address
//! that is wrong. A mirror gets less patience, as there is somebody else to ask.
//!
//! Proxies are those of the usual variables (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`,
//! `NO_PROXY`).

use super::failure::{Failure, chain, pause, retry_after, said};
use super::hosts::{Capabilities, Host};
use super::login::Login;
use crate::{ImageError, Problem};
use http_auth::ChallengeRef;
use reqwest::header::{ACCEPT, HeaderMap, RANGE, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, Identity, RequestBuilder, Response, StatusCode, Url};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const CONNECT: Duration = Duration::from_secs(20);
/// A connection without a byte for so long is broken.
const SILENCE: Duration = Duration::from_secs(60);
/// How often something is asked for.
const ATTEMPTS: u32 = 6;
/// The same of a mirror.
const MIRROR_ATTEMPTS: u32 = 2;
/// Longer than this nobody is made to wait by a registry.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// The same of a mirror.
const LONGEST_MIRROR_WAIT: Duration = Duration::from_secs(2);
/// A token with all its claims is at most this long.
const MAX_TOKEN: usize = 1 << 20;

/// A repository on one of the hosts of a registry.
pub(super) struct Http {
    client: Client,
    /// As the user calls it; a mirror by its host.
    pub registry: String,
    pub can: Capabilities,
    host: Host,
    pub(super) base: Url,
    repository: String,
    pub(super) login: Login,
    /// The registry that it is a mirror of.
    mirror_of: Option<String>,
    authorization: Mutex<Option<Authorization>>,
    /// Whether the registry ever answered.
    answered: AtomicBool,
    /// Whether it could not be reached.
    failed: AtomicBool,
}

/// What goes along with a request.
#[derive(Clone)]
enum Authorization {
    Basic(String, String),
    Bearer(String),
}

impl Authorization {
    fn apply(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Basic(user, password) => request.basic_auth(user, Some(password)),
            Self::Bearer(token) => request.bearer_auth(token),
        }
    }
}

impl Http {
    pub fn new(
        registry: &str,
        repository: &str,
        host: Host,
        login: Login,
    ) -> Result<Self, ImageError> {
        // Ring for everything; a provider that somebody installed before serves
        // as well, so the result does not matter.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut authorities = Vec::new();
        for (file, pem) in &host.authorities {
            let found = Certificate::from_pem_bundle(pem);
            authorities.extend(found.map_err(|error| unusable(file, &error))?);
        }
        let identity = host.client.as_ref().map(|(file, pem)| {
            let identity = Identity::from_pem(pem);
            identity.map_err(|error| unusable(file, &error))
        });
        let identity = identity.transpose()?;
        // `alone`: without the authorities of this machine.
        let build = |alone: bool| {
            let mut builder = Client::builder()
                .connect_timeout(host.dial_timeout.unwrap_or(CONNECT))
                .read_timeout(SILENCE)
                .user_agent(concat!("image-accel/", env!("CARGO_PKG_VERSION")));
            if alone {
                builder = builder.tls_certs_only(authorities.clone());
            } else if !authorities.is_empty() {
                builder = builder.tls_certs_merge(authorities.clone());
            }
            if let Some(identity) = identity.clone() {
                builder = builder.identity(identity);
            }
            if host.skip_verify {
                builder = builder.tls_danger_accept_invalid_certs(true);
            }
            builder.build()
        };
        // A machine may have none, and without TLS none is needed. Where it has some they
        // count all the same: for addresses that such a registry sends us to.
        let client = match build(false) {
            Err(_) if host.base.scheme() == "http" => build(true),
            client => client,
        };
        let client = client.map_err(|error| ImageError::Setup(chain(&error)))?;
        // Docker Hub's names without a slash are short.
        let repository = match registry {
            "docker.io" if !repository.contains('/') && !repository.is_empty() => {
                format!("library/{repository}")
            }
            _ => repository.to_owned(),
        };
        // Without one it is the registry itself that is asked.
        let base = match repository.is_empty() {
            true => Ok(host.base.clone()),
            false => host.base.join(&format!("{repository}/")),
        };
        let base = base.map_err(|error| ImageError::Setup(error.to_string()))?;
        let mirror_of = (!host.itself).then(|| registry.to_owned());
        Ok(Self {
            client,
            registry: match host.itself {
                true => registry.to_owned(),
                false => address(&base),
            },
            can: host.can,
            host,
            base,
            repository,
            login,
            mirror_of,
            authorization: Mutex::default(),
            answered: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        })
    }

    /// Asks for `path` (`manifests/…`, `blobs/…`), of which the first `from` bytes
    /// are not wanted; they may come nevertheless.
    pub async fn get(&self, path: &str, accept: &str, from: u64) -> Result<Response, Failure> {
        let mut url = self.url(path)?;
        if let Some(registry) = &self.mirror_of {
            // A mirror of several learns which one is meant.
            url.query_pairs_mut().append_pair("ns", registry);
        }
        self.ask(|client| {
            let mut request = client.get(url.clone());
            if !accept.is_empty() {
                request = request.header(ACCEPT, accept);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            request
        })
        .await
    }

    /// Where `path` of this repository is.
    pub fn url(&self, path: &str) -> Result<Url, Failure> {
        let url = self.base.join(path);
        url.map_err(|error| Failure::Connection(error.to_string()))
    }

    /// Sends a request for something of this repository, logged in if need be. It may
    /// be made several times.
    pub async fn ask(
        &self,
        request: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<Response, Failure> {
        self.ask_up_to(self.attempts(), request).await
    }

    /// The same without asking again when it fails.
    pub async fn ask_once(
        &self,
        request: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<Response, Failure> {
        self.ask_up_to(1, request).await
    }

    fn attempts(&self) -> u32 {
        match self.mirror_of {
            None => ATTEMPTS,
            Some(_) => MIRROR_ATTEMPTS,
        }
    }

    async fn ask_up_to(
        &self,
        attempts: u32,
        request: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let mut renewed = false;
        loop {
            let authorization = self.authorization();
            let answer = self
                .send(attempts, authorization.as_ref(), || {
                    self.signed(request(&self.client), authorization.as_ref())
                })
                .await?;
            match answer {
                Answer::Good(response) => return Ok(response),
                // Once: without a login until now, or with a token that has expired,
                // or is for less.
                Answer::Unauthorized(headers, _) if !renewed => {
                    renewed = true;
                    let authorization = self.authorize(&headers).await?;
                    *self.lock() = Some(authorization);
                }
                Answer::Unauthorized(_, said) => {
                    return Err(self.refused(&format!("401, it says {said:?}")));
                }
            }
        }
    }

    /// `request` with what this host is to be told, if it goes to this host: a registry
    /// may want uploads sent elsewhere, where our login is nobody's business.
    fn signed(
        &self,
        request: RequestBuilder,
        authorization: Option<&Authorization>,
    ) -> RequestBuilder {
        let (client, built) = request.build_split();
        let Ok(mut built) = built else {
            // Says what is wrong when it is sent.
            return self.client.get(self.base.clone());
        };
        if built.url().origin() != self.base.origin() {
            return RequestBuilder::from_parts(client, built);
        }
        for (name, value) in &self.host.headers {
            built.headers_mut().append(name, value.clone());
        }
        let request = RequestBuilder::from_parts(client, built);
        match authorization {
            Some(authorization) => authorization.apply(request),
            None => request,
        }
    }

    /// Whether it is worthwhile to ask this host when there are others.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Whether it ever answered anything.
    pub fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Whether it is shown a certificate of this client.
    pub fn shows_certificate(&self) -> bool {
        self.host.client.is_some()
    }

    /// Asks for something that lies elsewhere, without telling who we are.
    pub async fn get_elsewhere(&self, url: &str, from: u64) -> Result<Response, Failure> {
        let url = Url::parse(url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| Failure::Connection(format!("{url:?} is no web address")))?;
        let request = || match from {
            0 => self.client.get(url.clone()),
            _ => self
                .client
                .get(url.clone())
                .header(RANGE, format!("bytes={from}-")),
        };
        match self.send(self.attempts(), None, request).await? {
            Answer::Good(response) => Ok(response),
            // Which no login for this registry is for.
            Answer::Unauthorized(_, said) => Err(Failure::Refused {
                why: format!("{url} wants a login (401, it says {said:?})"),
                problem: Problem::Other,
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Authorization>> {
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn authorization(&self) -> Option<Authorization> {
        self.lock().clone()
    }

    /// That our login does not let us in; `how` it was said.
    fn refused(&self, how: &str) -> Failure {
        Failure::Refused {
            why: format!("{} ({how})", self.login.refused()),
            problem: self.login.problem().unwrap_or(Problem::Unauthorized),
        }
    }

    /// `text` without what nobody else may see: the login, and what was made of it.
    fn hidden(&self, text: String, authorization: Option<&Authorization>) -> String {
        let text = self.login.hidden(text);
        match authorization {
            Some(Authorization::Bearer(token)) if !token.is_empty() => text.replace(token, "…"),
            _ => text,
        }
    }

    /// Sends a request, which `authorization` goes along with, until it is answered, or cannot
    /// be.
    async fn send(
        &self,
        attempts: u32,
        authorization: Option<&Authorization>,
        request: impl Fn() -> RequestBuilder,
    ) -> Result<Answer, Failure> {
        let hide = |text| self.hidden(text, authorization);
        let mut attempt = 0;
        loop {
            let failure = match request().send().await {
                Ok(response) => {
                    self.answered.store(true, Ordering::Relaxed);
                    match response.status() {
                        code if code.is_success() => return Ok(Answer::Good(response)),
                        StatusCode::UNAUTHORIZED => {
                            let headers = response.headers().clone();
                            let said = said(response, hide).await;
                            return Ok(Answer::Unauthorized(headers, said));
                        }
                        code => Failure::Status {
                            code,
                            wait: retry_after(response.headers()),
                            said: said(response, hide).await,
                        },
                    }
                }
                Err(error) => Failure::connection(&error),
            };
            let longest = match self.mirror_of {
                None => LONGEST_WAIT,
                Some(_) => LONGEST_MIRROR_WAIT,
            };
            attempt += 1;
            let wait = match &failure {
                Failure::Status {
                    wait: Some(wait), ..
                } => *wait,
                _ => pause(attempt),
            };
            let known = self.has_answered();
            if attempt >= attempts || !known || !failure.may_pass() || wait > longest {
                if matches!(failure, Failure::Connection(_)) && !known {
                    self.failed.store(true, Ordering::Relaxed);
                }
                return Err(failure);
            }
            let (registry, why) = (&self.registry, self.explain(&failure));
            tracing::warn!(registry, why, "asking again in {wait:.1?}");
            tokio::time::sleep(wait).await;
        }
    }

    /// Gets what the registry wants to see.
    async fn authorize(&self, headers: &HeaderMap) -> Result<Authorization, Failure> {
        let texts = headers.get_all(WWW_AUTHENTICATE).iter();
        let texts: Vec<_> = texts.filter_map(|value| value.to_str().ok()).collect();
        let challenges = texts
            .iter()
            .filter_map(|text| http_auth::parse_challenges(text).ok())
            .flatten();
        let challenges: Vec<_> = challenges.collect();
        let find = |scheme: &str| {
            let mut all = challenges.iter();
            all.find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme))
        };
        if let Some(challenge) = find("Bearer") {
            return self.token(challenge).await.map(Authorization::Bearer);
        }
        match &self.login {
            Login::Password { user, password, .. } if find("Basic").is_some() => {
                Ok(Authorization::Basic(user.clone(), password.clone()))
            }
            Login::IdentityToken(_) if find("Basic").is_some() => Err(Failure::Refused {
                why: "the registry wants name and password, but your login is an identity token: log in again (401)".to_owned(),
                problem: Problem::Unauthorized,
            }),
            // It may want something that nobody here knows.
            Login::Password { .. } | Login::IdentityToken(_) => {
                let schemes: Vec<_> = challenges.iter().map(|one| one.scheme).collect();
                let wants = match schemes.is_empty() {
                    true => "it names none".to_owned(),
                    false => format!("it wants {}", schemes.join(" or ")),
                };
                Err(unknown_way(&format!("{wants} (401)")))
            }
            Login::Anonymous { .. } => Err(self.refused("401")),
        }
    }

    /// Asks the token server for a token to read the repository.
    async fn token(&self, challenge: &ChallengeRef<'_>) -> Result<String, Failure> {
        let parameter = |name: &str| {
            let mut all = challenge.params.iter();
            all.find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_unescaped())
        };
        let wrong = |why: String| unknown_way(&why);
        let realm = parameter("realm").ok_or_else(|| wrong("no token server".to_owned()))?;
        let mut url = Url::parse(&realm).map_err(|error| wrong(format!("{realm:?}: {error}")))?;
        let anonymous = matches!(self.login, Login::Anonymous { .. });
        if self.base.scheme() == "https" && url.scheme() != "https" && !anonymous {
            return Err(wrong(format!(
                "it wants your credentials sent to {realm:?} in the clear"
            )));
        }
        let service = parameter("service").unwrap_or_default();
        // Of a token that is for nothing no scope is said.
        let scope = parameter("scope").or_else(|| {
            let named = !self.repository.is_empty();
            named.then(|| format!("repository:{}:pull", self.repository))
        });
        let identity = match &self.login {
            Login::IdentityToken(token) => {
                let mut form = vec![
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token.as_str()),
                    ("client_id", "image-accel"),
                    ("service", service.as_str()),
                ];
                form.extend(scope.as_deref().map(|scope| ("scope", scope)));
                Some(form)
            }
            _ => {
                let mut query = url.query_pairs_mut();
                query.append_pair("service", &service);
                query.extend_pairs(scope.as_deref().map(|scope| ("scope", scope)));
                drop(query);
                None
            }
        };
        let request = || match (&identity, &self.login) {
            (Some(form), _) => self.client.post(url.clone()).form(form),
            (None, Login::Password { user, password, .. }) => self
                .client
                .get(url.clone())
                .basic_auth(user, Some(password)),
            (None, _) => self.client.get(url.clone()),
        };
        let refused = |code: u16, said: &str| self.refused(&format!("{code}, it says {said:?}"));
        let response = match self.send(self.attempts(), None, request).await {
            Ok(Answer::Good(response)) => response,
            Ok(Answer::Unauthorized(_, said)) => return Err(refused(401, &said)),
            // OAuth 2 says 400 for credentials that are no good.
            Err(Failure::Status { code, said, .. }) if matches!(code.as_u16(), 400 | 403) => {
                return Err(refused(code.as_u16(), &said));
            }
            Err(Failure::Status { code, .. })
                if identity.is_some() && matches!(code.as_u16(), 404 | 405) =>
            {
                return Err(Failure::Refused {
                    why: format!(
                        "your login is an identity token, which the token server {} does not take ({code}): log in again with name and password",
                        url.host_str().unwrap_or_default(),
                    ),
                    problem: Problem::Unauthorized,
                });
            }
            Err(failure) => return Err(failure),
        };
        let body = read(response, MAX_TOKEN).await?;
        let body: serde_json::Value = serde_json::from_slice(&body)
            .map_err(|error| wrong(format!("the token server's answer: {error}")))?;
        ["token", "access_token"]
            .iter()
            .find_map(|name| body.get(name)?.as_str())
            .map(str::to_owned)
            .ok_or_else(|| wrong("the token server's answer has no token".to_owned()))
    }
}

/// No login helps: it is asked for in a way that is none of ours.
fn unknown_way(why: &str) -> Failure {
    Failure::Refused {
        why: format!("its way to log in is not understood: {why}"),
        problem: Problem::Other,
    }
}

enum Answer {
    Good(Response),
    Unauthorized(HeaderMap, String),
}

/// A body of at most `most` bytes.
pub(super) async fn read(mut response: Response, most: usize) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    while let Some(piece) = response
        .chunk()
        .await
        .map_err(|error| Failure::connection(&error))?
    {
        body.extend_from_slice(&piece);
        if body.len() > most {
            let text = format!("more than {most} bytes came");
            return Err(Failure::Connection(text));
        }
    }
    Ok(body)
}

/// The host and port of an address.
pub(super) fn address(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn unusable(file: &Path, error: &reqwest::Error) -> ImageError {
    ImageError::Hosts {
        path: file.to_owned(),
        field: String::new(),
        why: format!("it cannot be used: {}", chain(error)),
    }
}
