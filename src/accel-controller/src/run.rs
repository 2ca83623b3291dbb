//! The loop: looks, and does what was planned.

mod logins;
mod nodes;
mod purging;
mod users;

use self::nodes::Known;
use crate::check::{Checked, Said, Trouble};
use crate::conditions;
use crate::job::{self, CHECK, MANAGED, Settings, TASK_UID};
use crate::labels::Looked;
use crate::login::{self, Log};
use crate::metrics::Metrics;
use crate::obstacles::{Obstacles, Part};
use crate::plan::{self, Observed, Plan, Step};
use crate::purge;
use crate::report;
use crate::resource::{
    AcceleratedImage, AcceleratedImageStatus, ImageAcceleration, ImageAccelerationStatus, Phase,
    SERVICE_NAME,
};
use crate::service;
use crate::users::Users;
use futures_util::StreamExt as _;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, LogParams, Patch, PatchParams};
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;
use tracing::{debug, info, warn};

/// What field managers and Events call the controller.
const NAME: &str = "accel-controller";

/// How long the cluster may take to give a log.
const LOG_TIMEOUT: Duration = Duration::from_secs(10);
/// More lines than tell how far the work is; the report is the last one.
const LOG_LINES: i64 = 200;
/// How long to wait after an error.
const RETRY: Duration = Duration::from_secs(15);
/// Changes that come together are looked at once: each status that is written is one.
const TOGETHER: Duration = Duration::from_millis(300);
/// How long a look at a task or the service may take, with what is done then: an answer that
/// never comes must not keep those waiting that wait for each other.
const LOOK: Duration = Duration::from_secs(60);
/// How long it may take to tell that something has gone wrong.
const TELL: Duration = Duration::from_secs(10);
/// How often the service's status is made again.
const SERVICE_PAUSE: Duration = Duration::from_secs(15);

/// What the cluster did not do.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It refused something, or could not be reached.
    #[error(transparent)]
    Refused(#[from] Box<kube::Error>),
    /// It did not answer in time.
    #[error("the cluster does not answer")]
    Silent(#[from] tokio::time::error::Elapsed),
}

impl From<kube::Error> for RunError {
    fn from(error: kube::Error) -> Self {
        Self::Refused(Box::new(error))
    }
}

impl RunError {
    /// For people.
    fn in_words(&self) -> String {
        match self {
            Self::Refused(error) => in_words(error),
            Self::Silent(_) => self.to_string(),
        }
    }
}

type LoopError = controller::Error<RunError, watcher::Error>;

struct Context {
    client: Client,
    settings: Settings,
    recorder: Recorder,
    /// The cluster's nodes: nobody minds one that came a moment ago. Never held while the
    /// cluster is asked.
    known: std::sync::Mutex<Option<Known>>,
    metrics: Arc<Metrics>,
    /// What this process is called among several.
    identity: String,
    /// What keeps it from its work.
    obstacles: std::sync::Mutex<Obstacles>,
    /// Which nodes use what, as was known last.
    users: std::sync::Mutex<Option<Arc<Users>>>,
    /// What came of the last look at the nodes.
    looked: std::sync::Mutex<Option<Looked>>,
    /// The last task whose Job could not use UFS.
    trouble: std::sync::Mutex<Option<Trouble>>,
    /// That this has changed. One loop writes the service's status, or what one says of it
    /// would be undone by what another one has read before.
    counted: Notify,
    /// Held while Jobs are counted and one is made, so that there are never more than the
    /// limit.
    starting: Mutex<()>,
}

/// Works until the process ends. Only one may at a time: see [`crate::lead`].
pub async fn run(client: Client, settings: Settings, identity: String, metrics: Arc<Metrics>) {
    let reporter = Reporter {
        controller: NAME.to_owned(),
        instance: Some(identity.clone()),
    };
    let context = Arc::new(Context {
        recorder: Recorder::new(client.clone(), reporter),
        settings,
        known: std::sync::Mutex::default(),
        metrics,
        identity,
        obstacles: std::sync::Mutex::default(),
        users: std::sync::Mutex::default(),
        looked: std::sync::Mutex::default(),
        trouble: std::sync::Mutex::default(),
        counted: Notify::new(),
        starting: Mutex::new(()),
        client,
    });
    let of_jobs = watcher::Config::default().labels(&job::selector(MANAGED));
    let tasks = Controller::new(
        context.all::<AcceleratedImage>(),
        watcher::Config::default(),
    );
    let tasks = tasks.with_config(controller::Config::default().debounce(TOGETHER));
    let (of_ended, known, used) = (tasks.store(), tasks.store(), tasks.store());
    context.metrics.watch(tasks.store());
    context.metrics.leads();
    let tasks = tasks
        .watches(context.own::<Job>(), of_jobs, move |job| {
            // One that has ended makes room for those that wait.
            let mut all = match job::is_at_work(&job) {
                true => Vec::new(),
                false => waiting(&of_ended.state()),
            };
            if let Some((namespace, name)) = job::task_of(&job) {
                all.push(ObjectRef::new(name).within(namespace));
            }
            all
        })
        .watches(
            context.all::<ImageAcceleration>(),
            watcher::Config::default(),
            move |_| {
                // Each status of it that is written is an event, too.
                let all = known.state();
                all.iter()
                    .filter(|task| plan::needs_service(task))
                    .map(|task| ObjectRef::from_obj(&**task))
                    .collect::<Vec<_>>()
            },
        )
        .run(
            |task, context| async move {
                let looked = timeout(LOOK, context.task(&task)).await?;
                if looked.is_ok() {
                    context.obstacles().passed(Part::Tasks);
                }
                looked
            },
            |task, error, context| {
                context.metrics.error();
                let (namespace, name) = (task.namespace().unwrap_or_default(), task.name_any());
                warn!(task = name, "looked at in vain: {error}");
                let why = error.in_words();
                let what = format!("the task {namespace}/{name} cannot be looked at: {why}");
                context.meet(Part::Tasks, what);
                Action::requeue(RETRY)
            },
            Arc::clone(&context),
        );
    let counted = futures_util::stream::unfold(Arc::clone(&context), |context| async move {
        context.counted.notified().await;
        Some(((), context))
    });
    let services = Controller::new(
        context.all::<ImageAcceleration>(),
        watcher::Config::default(),
    )
    .reconcile_all_on(counted)
    .run(
        |service, context| async move {
            let looked = timeout(LOOK, context.service(&service)).await;
            let looked = looked.unwrap_or_else(|late| Err(late.into()));
            match &looked {
                Ok(_) => context.obstacles().passed(Part::Service),
                Err(error) => context.tell_obstacle(&service, error).await,
            }
            looked
        },
        |_, error, context| {
            context.metrics.error();
            warn!("the service's status cannot be made: {error}");
            Action::requeue(RETRY)
        },
        Arc::clone(&context),
    );
    tokio::join!(
        context.label_nodes(),
        context.tell_users(used),
        tasks.for_each(|looked| context.tell_of(looked.err())),
        services.for_each(|looked| context.tell_of(looked.err()))
    );
}

/// Whether a task that is being deleted is known to wait for nodes.
fn waits_for_nodes(task: &AcceleratedImage) -> bool {
    let status = task.status.as_ref();
    status.is_some_and(|status| !status.waits_for_nodes.is_empty())
}

/// Tasks that may wait for others.
fn waiting(tasks: &[Arc<AcceleratedImage>]) -> Vec<ObjectRef<AcceleratedImage>> {
    let phase = |task: &AcceleratedImage| Some(task.status.as_ref()?.phase);
    let waiting = tasks
        .iter()
        .filter(|task| matches!(phase(task), Some(Phase::Creating | Phase::Deleting)));
    waiting.map(|task| ObjectRef::from_obj(&**task)).collect()
}

impl Context {
    fn all<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = ()>,
    {
        Api::all(self.client.clone())
    }

    /// Those of the controller's namespace.
    fn own<K>(&self) -> Api<K>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.settings.namespace)
    }

    fn obstacles(&self) -> MutexGuard<'_, Obstacles> {
        let obstacles = self.obstacles.lock();
        obstacles.unwrap_or_else(PoisonError::into_inner)
    }

    fn meet(&self, part: Part, what: String) {
        self.obstacles().met(part, what, Instant::now());
    }

    /// What keeps the loop from noticing anything: it goes on trying. What went wrong with one
    /// object has been told.
    async fn tell_of(&self, error: Option<LoopError>) {
        if let Some(LoopError::QueueError(error)) = error {
            warn!("the cluster cannot be watched: {error}");
            if let Some(why) = why_unwatched(&error) {
                self.meet(Part::Watch, format!("the cluster cannot be watched: {why}"));
            }
        }
    }

    async fn task(&self, task: &AcceleratedImage) -> Result<Action, RunError> {
        let mut starting = None;
        let plan = loop {
            let plan = self.look(task).await?;
            let starts = plan.steps.iter().any(|step| matches!(step, Step::Run(_)));
            if !starts || starting.is_some() {
                break plan;
            }
            // Again, while nobody else starts one.
            starting = Some(self.starting.lock().await);
        };
        let action = plan
            .again
            .map_or_else(Action::await_change, Action::requeue);
        let status = plan.status.clone().or_else(|| task.status.clone());
        if let Some(status) = &plan.status {
            self.tell(task, status).await?;
        }
        for step in plan.steps {
            debug!(task = %task.name_any(), ?step, "does");
            if let Err(error) = self.step(task, &step).await {
                self.not_taken(task, status.unwrap_or_default(), &step, &error)
                    .await?;
                return Ok(Action::requeue(RETRY));
            }
        }
        drop(starting);
        Ok(action)
    }

    /// Observes and plans.
    async fn look(&self, task: &AcceleratedImage) -> Result<Plan, RunError> {
        let service = self
            .all::<ImageAcceleration>()
            .get_opt(SERVICE_NAME)
            .await?;
        let service = service.filter(|service| purge::serves(service, task));
        let all = self
            .own::<Job>()
            .list(&ListParams::default().labels(&job::selector(MANAGED)))
            .await?;
        let uid = task.uid().unwrap_or_default();
        // Those that check are short, and wait for nothing.
        let of_tasks = (all.items.into_iter()).filter(|job| !job.labels().contains_key(CHECK.0));
        let (jobs, others): (Vec<_>, Vec<_>) =
            of_tasks.partition(|job| job.labels().get(TASK_UID) == Some(&uid));
        let (pod, log) = self.newest_pod(&jobs).await?;
        let secret = match task.metadata.deletion_timestamp {
            None if plan::is_ready(task) => login::Secret::Unnamed,
            _ => self.secret(task).await?,
        };
        let nodes = match task.metadata.deletion_timestamp {
            Some(_) if waits_for_nodes(task) => Some(self.nodes().await?),
            _ => None,
        };
        let at_work = |jobs: &[Job]| jobs.iter().filter(|job| job::is_at_work(job)).count();
        let others_at_work = at_work(&others);
        let plan = plan::plan(&Observed {
            task,
            nodes: nodes.as_deref(),
            secret,
            service: service.as_ref(),
            jobs: &jobs,
            pod: pod.as_ref(),
            log,
            others_at_work,
            settings: &self.settings,
            now: Timestamp::now(),
        });
        if let Some(why) = &plan.ufs_fails {
            let (namespace, name) = (task.namespace().unwrap_or_default(), task.name_any());
            *self.trouble() = Some(Trouble {
                at: Timestamp::now(),
                what: format!("the Job of the task {namespace}/{name} cannot use it: {why}"),
            });
        }
        let jobs = others_at_work + at_work(&jobs);
        self.metrics.looked(&uid, plan.waits, jobs);
        Ok(plan)
    }

    /// The newest pod of the newest Job, and its log.
    async fn newest_pod(&self, jobs: &[Job]) -> Result<(Option<Pod>, Option<Log>), RunError> {
        let newest = jobs.iter().max_by_key(|job| job.creation_timestamp());
        let Some(job) = newest else {
            return Ok((None, None));
        };
        let of_job = ListParams::default().labels(&format!("job-name={}", job.name_any()));
        let pods = self.own::<Pod>().list(&of_job).await?.items;
        let pod = pods.into_iter().max_by_key(ResourceExt::creation_timestamp);
        let log = match &pod {
            Some(pod) if has_log(pod) => Some(self.log(&pod.name_any()).await),
            _ => None,
        };
        Ok((pod, log))
    }

    async fn log(&self, pod: &str) -> Log {
        let options = LogParams {
            tail_lines: Some(LOG_LINES),
            ..LogParams::default()
        };
        let pods = self.own::<Pod>();
        match timeout(LOG_TIMEOUT, pods.logs(pod, &options)).await {
            Ok(Ok(text)) => Ok(report::read(&text)),
            Ok(Err(error)) => Err(in_words(&error)),
            Err(_) => Err("the node does not answer".to_owned()),
        }
    }

    async fn step(&self, task: &AcceleratedImage, step: &Step) -> Result<(), kube::Error> {
        match step {
            Step::AddFinalizer | Step::RemoveFinalizer => {
                let keep = *step == Step::AddFinalizer;
                let patch = Patch::Merge(plan::finalizer(&task.metadata, keep));
                let (name, plain) = (task.name_any(), PatchParams::default());
                match self.tasks_beside(task).patch(&name, &plain, &patch).await {
                    // The newer version comes, and is looked at.
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
                    patched => patched.map(drop),
                }
            }
            Step::Run(job) => {
                let name = job.name_any();
                info!(task = %task.name_any(), job = name, "starts a Job");
                let made = self.run_job(job).await?;
                self.metrics.job_started();
                match made.uid() {
                    Some(uid) if job::is_lent(job) => self.lend(task, &name, &uid).await,
                    _ => Ok(()),
                }
            }
            Step::Lend { job, uid } => self.lend(task, job, uid).await,
            Step::Hold(name) => self.hold_job(name).await,
            Step::Stop(name) => self.stop_job(name).await,
        }
    }

    async fn hold_job(&self, name: &str) -> Result<(), kube::Error> {
        let (plain, hold) = (PatchParams::default(), Patch::Merge(job::hold()));
        match self.own::<Job>().patch(name, &plain, &hold).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            held => held.map(drop),
        }
    }

    async fn run_job(&self, job: &Job) -> Result<Job, kube::Error> {
        let apply = PatchParams::apply(NAME).force();
        let jobs = self.own::<Job>();
        jobs.patch(&job.name_any(), &apply, &Patch::Apply(job))
            .await
    }

    async fn stop_job(&self, name: &str) -> Result<(), kube::Error> {
        // The Job stays until its pods are gone.
        let jobs = self.own::<Job>();
        match jobs.delete(name, &DeleteParams::foreground()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => deleted.map(drop),
        }
    }

    /// A step could not be taken.
    async fn not_taken(
        &self,
        task: &AcceleratedImage,
        status: AcceleratedImageStatus,
        step: &Step,
        error: &kube::Error,
    ) -> Result<(), RunError> {
        self.metrics.error();
        let (status, stuck) =
            plan::not_taken(task, status, step, &in_words(error), Timestamp::now());
        self.tell(task, &status).await?;
        if let Some(job) = stuck {
            self.stop_job(&job).await?;
        }
        Ok(())
    }

    /// Writes the status, and an Event if the phase is another one.
    async fn tell(
        &self,
        task: &AcceleratedImage,
        status: &AcceleratedImageStatus,
    ) -> Result<(), RunError> {
        let patch = status_patch(task, &status.planned());
        let apply = PatchParams::apply(NAME).force();
        let tasks = self.tasks_beside(task);
        tasks
            .patch_status(&task.name_any(), &apply, &Patch::Apply(patch))
            .await?;
        let before = task.status.clone().unwrap_or_default();
        self.metrics.told(&before, status);
        let told = |status: &AcceleratedImageStatus| {
            let conditions = status.conditions.iter();
            let mut while_deleted: Vec<_> = conditions
                .filter(|condition| [plan::IN_USE, plan::REMOVED].contains(&&*condition.type_))
                .map(|condition| (condition.type_.clone(), condition.status.clone()))
                .collect();
            while_deleted.sort();
            (status.phase, status.observed_generation, while_deleted)
        };
        if told(&before) == told(status) {
            return Ok(());
        }
        let removed = conditions::find(&status.conditions, plan::REMOVED);
        info!(task = %task.name_any(), phase = ?status.phase, "{}", status.message);
        let bad = matches!(
            status.phase,
            Phase::CreateError | Phase::DeleteError | Phase::Unknown
        );
        let reason = match removed {
            Some(removed) => removed.reason.clone(),
            None if status.phase == Phase::Deleting && !status.waits_for_nodes.is_empty() => {
                plan::IN_USE.to_owned()
            }
            None => format!("{:?}", status.phase),
        };
        let bad = bad || (reason != "Removed" && removed.is_some());
        let event = Event {
            type_: if bad {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason,
            // The API takes a kilobyte.
            note: Some(status.message.chars().take(250).collect()),
            action: "Convert".to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &task.object_ref(&())).await {
            // Nobody's work depends on it.
            warn!(task = %task.name_any(), "no Event can be made: {error}");
        }
        Ok(())
    }

    fn tasks_beside(&self, task: &AcceleratedImage) -> Api<AcceleratedImage> {
        Api::namespaced(self.client.clone(), &task.namespace().unwrap_or_default())
    }

    async fn service(&self, service: &ImageAcceleration) -> Result<Action, RunError> {
        // As it is now: what was said last tells how to go on.
        let services = self.all::<ImageAcceleration>();
        let known = services.get_opt(&service.name_any()).await?;
        let Some(service) = &known.filter(|known| known.uid() == service.uid()) else {
            return Ok(Action::await_change());
        };
        if service.metadata.deletion_timestamp.is_some() {
            return self.purge(service).await;
        }
        self.keep_for_purge(service).await?;
        let checked = self.look_at_check(service).await?;
        self.tell_service(service, &checked).await?;
        let again = self.go_on_with_check(&checked).await;
        let again = again.unwrap_or(SERVICE_PAUSE).min(SERVICE_PAUSE);
        Ok(Action::requeue(again))
    }

    /// What is to be said of this controller.
    fn controller(&self) -> Said {
        let obstacles = self.obstacles();
        service::controller(&self.identity, obstacles.lasting(Instant::now()))
    }

    /// The service's status could not be made. That at least is written into it, if it can be.
    async fn tell_obstacle(&self, service: &ImageAcceleration, error: &RunError) {
        let why = error.in_words();
        let what = format!("the status of the ImageAcceleration cannot be made: {why}");
        self.meet(Part::Service, what);
        let controller = self.controller();
        let told = async {
            let services = self.all::<ImageAcceleration>();
            let known = services.get_opt(&service.name_any()).await?;
            if let Some(known) = known.filter(|known| known.uid() == service.uid())
                && let Some(status) = service::hindered(&known, &controller, Timestamp::now())
            {
                self.write_service(&known, &status).await?;
            }
            Ok::<_, RunError>(())
        };
        if let Err(error) = timeout(TELL, told)
            .await
            .unwrap_or_else(|late| Err(late.into()))
        {
            warn!("nor can that be told: {error}");
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn tasks(&self) -> Result<Vec<AcceleratedImage>, RunError> {
        let all = self.all::<AcceleratedImage>();
        Ok(all.list(&ListParams::default()).await?.items)
    }

    /// Makes the status, and writes it unless it is what is said already.
    async fn tell_service(
        &self,
        service: &ImageAcceleration,
        checked: &Checked,
    ) -> Result<(), RunError> {
        let claims = self.own::<PersistentVolumeClaim>();
        let claim = match &service.spec.ufs.claim_name {
            Some(name) => claims.get_opt(name).await?,
            None => None,
        };
        let tasks = self.tasks().await?;
        let looked = self.looked().clone();
        let now = Timestamp::now();
        let controller = self.controller();
        let (claim, looked) = (claim.as_ref(), looked.as_ref());
        let status = service::status(service, &controller, checked, claim, &tasks, looked, now);
        self.write_service(service, &status).await
    }

    async fn write_service(
        &self,
        service: &ImageAcceleration,
        status: &ImageAccelerationStatus,
    ) -> Result<(), RunError> {
        if service.status.as_ref() != Some(status) {
            let apply = PatchParams::apply(NAME).force();
            let patch = status_patch(service, status);
            let services = self.all::<ImageAcceleration>();
            services
                .patch_status(&service.name_any(), &apply, &Patch::Apply(patch))
                .await?;
        }
        Ok(())
    }
}

/// A status for server-side apply. The UID keeps it from another object of the same name.
fn status_patch<K>(of: &K, status: &impl serde::Serialize) -> Value
where
    K: Resource<DynamicType = ()>,
{
    json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": of.name_any(), "namespace": of.namespace(), "uid": of.uid()},
        "status": status,
    })
}

fn has_log(pod: &Pod) -> bool {
    let containers = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    let state = containers.and_then(|all| all.first()?.state.as_ref());
    state.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
}

/// What the API server says, without the rest.
fn in_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        error => error.to_string(),
    }
}

/// The same of a watch; none if that is a part of watching.
fn why_unwatched(error: &watcher::Error) -> Option<String> {
    /// It was idle for so long that the cluster has forgotten where it was, and begins anew.
    const GONE: u16 = 410;
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Some(in_words(error)),
        watcher::Error::WatchError(status) if status.code == GONE => None,
        watcher::Error::WatchError(status) => Some(status.message.clone()),
        watcher::Error::NoResourceVersion => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn why_nothing_is_watched_is_told_in_words_unless_it_goes_on_by_itself() {
        let status = |code| {
            let said = Status::failure("it says why", "Reason");
            Box::new(said.with_code(code))
        };
        let forbidden = || kube::Error::Api(status(403));
        let why = Some("it says why".to_owned());
        for error in [
            watcher::Error::InitialListFailed(forbidden()),
            watcher::Error::WatchStartFailed(forbidden()),
            watcher::Error::WatchFailed(forbidden()),
            watcher::Error::WatchError(status(500)),
        ] {
            assert_eq!(why_unwatched(&error), why);
        }
        let gone = watcher::Error::WatchError(status(410));
        assert_eq!(why_unwatched(&gone), None);
        assert_eq!(RunError::from(forbidden()).in_words(), "it says why");
    }
}
