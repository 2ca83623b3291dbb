use super::*;
use serde_json::Value;

#[test]
fn a_copy_has_the_logins_and_is_taken_whatever_is_in_them() {
    let secret = json!({"metadata": {"name": "mine", "namespace": "team"}, "type": SECRET_TYPE,
        "data": {".dockerconfigjson": "bm8ganNvbg==", "other": "eA=="}});
    let owner: OwnerReference = serde_json::from_value(
        json!({"apiVersion": "batch/v1", "kind": "Job", "name": "accel-u-1-0", "uid": "j"}),
    )
    .unwrap();
    let copy = copy(serde_json::from_value(secret).unwrap(), owner);
    let copy = serde_json::to_value(copy).unwrap();
    assert_eq!(copy["metadata"]["name"], "accel-u-1-0");
    assert_eq!(copy["metadata"]["ownerReferences"][0]["uid"], "j");
    assert_eq!(copy["type"], "Opaque");
    assert_eq!(copy["data"], json!({".dockerconfigjson": "bm8ganNvbg=="}));
}

#[test]
fn a_namespace_lets_the_controller_read_one_secret_and_nothing_else() {
    let text = access("image-accel", "team", "mine").unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    assert_eq!(documents.len(), 2);
    let expected = json!([{"apiGroups": [""], "resources": ["secrets"],
        "resourceNames": ["mine"], "verbs": ["get"]}]);
    assert_eq!(documents[0]["rules"], expected);
    for document in &documents {
        assert_eq!(document["metadata"]["namespace"], "team");
    }
    assert_eq!(
        documents[1]["roleRef"]["name"],
        documents[0]["metadata"]["name"]
    );
    assert_eq!(documents[1]["subjects"][0]["namespace"], "image-accel");
}
