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

/// Gives those whose status is what it was `before` the time that they had then, whatever was
/// said of them in between.
pub fn keep_times(all: &mut [Condition], before: &[Condition]) {
    for said in all {
        let was = find(before, &said.type_).filter(|was| was.status == said.status);
        if let Some(was) = was {
            said.last_transition_time = was.last_transition_time.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_in_between_is_no_change() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let mut all = Vec::new();
        set(&mut all, ["Kept", "False", "Why", ""], Some(1), at(1));
        set(&mut all, ["Changed", "False", "Why", ""], Some(1), at(1));
        let before = all.clone();
        for (status, second) in [("Unknown", 2), ("False", 3)] {
            set(&mut all, ["Kept", status, "Why", ""], Some(1), at(second));
        }
        set(&mut all, ["Changed", "True", "Why", ""], Some(1), at(3));
        keep_times(&mut all, &before);
        assert_eq!(all[0], before[0]);
        assert_eq!(all[1].last_transition_time, Time(at(3)));
    }
}
