//! Conditions: what the controller says of an object, one of each type.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// The one of this type.
pub fn find<'a>(all: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    all.iter().find(|condition| condition.type_ == type_)
}

/// Whether there is one of this type, and it is `True`.
pub fn is_true(all: &[Condition], type_: &str) -> bool {
    find(all, type_).is_some_and(|condition| condition.status == "True")
}

/// Puts a condition in the place of the one of its type. Its time stays while its status does.
pub fn set(
    all: &mut Vec<Condition>,
    [type_, status, reason, message]: [&str; 4],
    generation: Option<i64>,
    now: Timestamp,
) {
    let there = all.iter_mut().find(|condition| condition.type_ == type_);
    let since = match &there {
        Some(there) if there.status == status => there.last_transition_time.clone(),
        _ => Time(now),
    };
    let condition = Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: generation,
        last_transition_time: since,
    };
    match there {
        Some(there) => *there = condition,
        None => all.push(condition),
    }
}
