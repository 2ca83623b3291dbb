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
//! that is wrong.

use super::login::Login;
use crate::ImageError;
use http_auth::ChallengeRef;
use reqwest::header::{ACCEPT, HeaderMap, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const CONNECT: Duration = Duration::from_secs(20);
/// A connection without a byte for so long is broken.
const SILENCE: Duration = Duration::from_secs(60);
/// How often something is asked for.
const ATTEMPTS: u32 = 6;
/// Longer than this nobody is made to wait by a registry.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// What is read of an answer that says no.
const MAX_REFUSAL: usize = 64 << 10;
/// A token with all its claims is at most this long.
const MAX_TOKEN: usize = 1 << 20;

/// A repository in a registry.
pub(super) struct Http {
    client: Client,
    /// As the user calls it.
    pub registry: String,
    base: Url,
    repository: String,
    login: Login,
    authorization: Mutex<Option<Authorization>>,
    /// Whether the registry ever answered.
    answered: AtomicBool,
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

/// Why something was not had.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer, or one that broke off.
    Connection(String),
    /// The registry does not let us in.
    Refused(String),
    /// Another answer than the wanted one.
    Status {
        code: StatusCode,
        /// What it says about it.
        said: String,
        /// How long it wants us to wait.
        wait: Option<Duration>,
    },
}

impl Failure {
    fn connection(error: &reqwest::Error) -> Self {
        Self::Connection(chain(error))
    }

    /// Whether it may go well the next time.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Refused(_) => false,
            Self::Status { code, .. } => {
                code.is_server_error() && *code != StatusCode::NOT_IMPLEMENTED
                    || *code == StatusCode::TOO_MANY_REQUESTS
                    || *code == StatusCode::REQUEST_TIMEOUT
            }
        }
    }

    /// Whether it is not there.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Status { code, .. } if *code == StatusCode::NOT_FOUND)
    }
}

/// The pause before the next attempt, after `attempt` of them.
pub(super) fn pause(attempt: u32) -> Duration {
    Duration::from_millis(250 << attempt.min(6))
}

impl Http {
    pub fn new(
        registry: &str,
        repository: &str,
        login: Login,
        plain_http: bool,
    ) -> Result<Self, ImageError> {
        // Ring for everything; a provider that somebody installed before serves
        // as well, so the result does not matter.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .user_agent(concat!("image-accel/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ImageError::Setup(chain(&error)))?;
        // Docker Hub is elsewhere, and names without a slash are short there.
        let (host, repository) = match registry {
            "docker.io" if !repository.contains('/') => {
                ("registry-1.docker.io", format!("library/{repository}"))
            }
            "docker.io" => ("registry-1.docker.io", repository.to_owned()),
            _ => (registry, repository.to_owned()),
        };
        let scheme = if plain_http { "http" } else { "https" };
        let base = format!("{scheme}://{host}/v2/{repository}/");
        Ok(Self {
            client,
            registry: registry.to_owned(),
            base: Url::parse(&base).map_err(|error| ImageError::Registry {
                registry: registry.to_owned(),
                what: "anything".to_owned(),
                why: format!("{host:?} is no host: {error}"),
            })?,
            repository,
            login,
            authorization: Mutex::default(),
            answered: AtomicBool::new(false),
        })
    }

    /// Asks for `path` (`manifests/…`, `blobs/…`), of which the first `from` bytes
    /// are not wanted; they may come nevertheless.
    pub async fn get(&self, path: &str, accept: &str, from: u64) -> Result<Response, Failure> {
        let url = self.url(path)?;
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
        let mut renewed = false;
        loop {
            let authorization = self.authorization();
            let answer = self
                .send(|| {
                    let request = request(&self.client);
                    match &authorization {
                        Some(authorization) => authorization.apply(request),
                        None => request,
                    }
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
                    return Err(Failure::Refused(format!(
                        "{} (401, it says {said:?})",
                        self.login.refused()
                    )));
                }
            }
        }
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
        match self.send(request).await? {
            Answer::Good(response) => Ok(response),
            Answer::Unauthorized(_, said) => Err(Failure::Refused(format!(
                "{url} wants a login (401, it says {said:?})"
            ))),
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

    /// Sends a request until it is answered, or cannot be.
    async fn send(&self, request: impl Fn() -> RequestBuilder) -> Result<Answer, Failure> {
        let mut attempt = 0;
        loop {
            let failure = match request().send().await {
                Ok(response) => {
                    self.answered.store(true, Ordering::Relaxed);
                    match response.status() {
                        code if code.is_success() => return Ok(Answer::Good(response)),
                        StatusCode::UNAUTHORIZED => {
                            let headers = response.headers().clone();
                            return Ok(Answer::Unauthorized(headers, said(response).await));
                        }
                        code => Failure::Status {
                            code,
                            wait: retry_after(response.headers()),
                            said: said(response).await,
                        },
                    }
                }
                Err(error) => Failure::connection(&error),
            };
            attempt += 1;
            let wait = match &failure {
                Failure::Status {
                    wait: Some(wait), ..
                } => *wait,
                _ => pause(attempt),
            };
            let known = self.answered.load(Ordering::Relaxed);
            if attempt == ATTEMPTS || !known || !failure.may_pass() || wait > LONGEST_WAIT {
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
            Login::IdentityToken(_) if find("Basic").is_some() => Err(Failure::Refused(
                "the registry wants name and password, but your login is an identity token: log in again (401)".to_owned(),
            )),
            login => Err(Failure::Refused(format!("{} (401)", login.refused()))),
        }
    }

    /// Asks the token server for a token to read the repository.
    async fn token(&self, challenge: &ChallengeRef<'_>) -> Result<String, Failure> {
        let parameter = |name: &str| {
            let mut all = challenge.params.iter();
            all.find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_unescaped())
        };
        let wrong =
            |why: String| Failure::Refused(format!("its way to log in is not understood: {why}"));
        let realm = parameter("realm").ok_or_else(|| wrong("no token server".to_owned()))?;
        let mut url = Url::parse(&realm).map_err(|error| wrong(format!("{realm:?}: {error}")))?;
        let anonymous = matches!(self.login, Login::Anonymous { .. });
        if self.base.scheme() == "https" && url.scheme() != "https" && !anonymous {
            return Err(wrong(format!(
                "it wants your credentials sent to {realm:?} in the clear"
            )));
        }
        let service = parameter("service").unwrap_or_default();
        let scope =
            parameter("scope").unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let identity = match &self.login {
            Login::IdentityToken(token) => Some([
                ("grant_type", "refresh_token"),
                ("refresh_token", token.as_str()),
                ("client_id", "image-accel"),
                ("service", service.as_str()),
                ("scope", scope.as_str()),
            ]),
            _ => {
                let mut query = url.query_pairs_mut();
                query.append_pair("service", &service);
                query.append_pair("scope", &scope);
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
        let refused = |code: u16, said: &str| {
            Failure::Refused(format!(
                "{} ({code}, it says {said:?})",
                self.login.refused()
            ))
        };
        let response = match self.send(request).await {
            Ok(Answer::Good(response)) => response,
            Ok(Answer::Unauthorized(_, said)) => return Err(refused(401, &said)),
            // OAuth 2 says 400 for credentials that are no good.
            Err(Failure::Status { code, said, .. }) if matches!(code.as_u16(), 400 | 403) => {
                return Err(refused(code.as_u16(), &said));
            }
            Err(Failure::Status { code, .. })
                if identity.is_some() && matches!(code.as_u16(), 404 | 405) =>
            {
                return Err(Failure::Refused(format!(
                    "your login is an identity token, which the token server {} does not take ({code}): log in again with name and password",
                    url.host_str().unwrap_or_default(),
                )));
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

    /// What a failure means, and what to do about it.
    pub fn explain(&self, failure: &Failure) -> String {
        match failure {
            Failure::Connection(text) => {
                let hint = match self.base.scheme() {
                    "https" if text.contains("InvalidContentType") => {
                        "; it does not speak TLS: --plain-http, if you trust the network"
                    }
                    "https" if text.contains("UnknownIssuer") => {
                        "; if the registry's certificate is your own authority's, install that on this machine (update-ca-certificates)"
                    }
                    _ => "",
                };
                format!("{text}{hint}")
            }
            Failure::Refused(text) => text.clone(),
            Failure::Status { code, said, wait } => {
                let number = code.as_u16();
                let what = match number {
                    403 => match &self.login {
                        Login::Anonymous { .. } => "the registry does not allow it without a login, or not at all: use docker login or skopeo login, or --username with --password-stdin".to_owned(),
                        Login::Password { user, .. } => format!("the registry does not allow it to user {user:?}: ask its owner for the right to pull"),
                        Login::IdentityToken(_) => "the registry does not allow it to your login: ask its owner for the right to pull".to_owned(),
                    },
                    404 => "the registry does not have it: check the name and the tag or digest (some registries also say so of what you may not see)".to_owned(),
                    429 => match wait {
                        Some(wait) => format!("too many requests: the registry wants {} s of patience; try again then, or with a login that may do more", wait.as_secs()),
                        None => "too many requests: try again later, or with a login that may do more".to_owned(),
                    },
                    500.. => "the registry itself has failed: try again later, or tell who runs it".to_owned(),
                    _ => "the registry gives an answer that is not understood".to_owned(),
                };
                match said.is_empty() {
                    true => format!("{what} ({number})"),
                    false => format!("{what} ({number}, it says {said:?})"),
                }
            }
        }
    }

    /// The error that a failure is when `what` was wanted.
    pub fn error(&self, what: &str, failure: &Failure) -> ImageError {
        ImageError::Registry {
            registry: self.registry.clone(),
            what: what.to_owned(),
            why: self.explain(failure),
        }
    }
}

impl Http {
    /// The error that a failure is when `what` was pushed.
    pub fn push_error(&self, what: &str, failure: &Failure) -> ImageError {
        let why = match failure {
            Failure::Status { code, .. } if code.as_u16() == 404 => {
                "there is no such repository, and it is not made by pushing: make it first, or name another (404)".to_owned()
            }
            Failure::Status { code, .. } if code.as_u16() == 405 => {
                "the registry takes no pushes: it is a mirror, or read-only (405)".to_owned()
            }
            failure => self.explain(failure).replace("the right to pull", "the right to push"),
        };
        ImageError::Push {
            registry: self.registry.clone(),
            what: what.to_owned(),
            why,
        }
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

/// What an answer says for people: the messages of an error as the distribution
/// specification has it, or its first line.
async fn said(mut response: Response) -> String {
    let mut body = Vec::new();
    while let Ok(Some(piece)) = response.chunk().await {
        body.extend_from_slice(&piece);
        if body.len() > MAX_REFUSAL {
            break;
        }
    }
    let text = String::from_utf8_lossy(&body);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let messages = json["errors"].as_array().map(|errors| {
        let message = |error: &serde_json::Value| {
            let (code, message) = (error["code"].as_str(), error["message"].as_str());
            message
                .filter(|m| !m.is_empty())
                .or(code)
                .map(str::to_owned)
        };
        errors.iter().filter_map(message).collect::<Vec<_>>()
    });
    match messages {
        Some(messages) if !messages.is_empty() => first_line(&messages.join("; ")),
        _ => first_line(&text),
    }
}

/// The seconds that an answer wants us to wait; a date is not understood.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse();
    seconds.ok().map(Duration::from_secs)
}

/// An error with everything below it: HTTP clients hide the reason deep down.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
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

pub(super) fn first_line(text: &str) -> String {
    let line = text.trim().lines().next().unwrap_or_default();
    line.chars().take(200).collect()
}
