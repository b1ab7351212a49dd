"""The files of `deploy/` against the schemas of the charts and resources that they are for. Nothing is deployed.

    python -m eval.checks.kubernetes --stack STACK --kuberay KUBERAY --out eval/results/kubernetes.json

STACK and KUBERAY are clones of github.com/vllm-project/production-stack and github.com/ray-project/kuberay. Checked are
`deploy/production-stack.yaml` against the chart's `values.schema.json` and its `values.yaml` (a key that the chart does
not have is a mistake that the schema lets pass), its adapters against the CRD LoraAdapter, `deploy/rayservice.yaml`
against the CRD RayService with no unknown field, and the Serve config in it against Ray's own schema and the
application's arguments.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from eval.record import make_parser, write_record
from soka_serve.io.versions import versions_of

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def strict(schema: Any) -> Any:
    """A CRD's schema in which fields that it does not name are errors, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    open_to_all = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_to_all:
        found["additionalProperties"] = False
    if found.pop("x-kubernetes-int-or-string", False):
        return {}
    return found


def unknown(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """Keys of values that the chart's own values do not have; an empty table or list there takes anything."""
    if isinstance(given, Mapping) and isinstance(known, Mapping) and known:
        for key, value in given.items():
            if key in known:
                yield from unknown(value, known[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: the chart has no such key"


def problems(schema: Any, value: Any) -> list[str]:
    """What of a value does not follow a schema."""
    return [
        f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in Draft202012Validator(schema).iter_errors(value)
    ]


def crd_schema(file: Path) -> Any:
    """The strict schema of the newest served version of a CRD."""
    versions = [v for v in yaml.safe_load(file.read_text())["spec"]["versions"] if v["served"]]
    schema = strict(versions[0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def check_stack(stack: Path) -> list[str]:
    """The values of the production stack, and the adapters among them."""
    given = yaml.safe_load((DEPLOY / "production-stack.yaml").read_text())
    schema = json.loads((stack / "helm" / "values.schema.json").read_text())
    found = problems(schema, given) + list(unknown(given, yaml.safe_load((stack / "helm" / "values.yaml").read_text())))
    (model,) = given["servingEngineSpec"]["modelSpec"]
    known = schema["properties"]["servingEngineSpec"]["properties"]["modelSpec"]["items"]["properties"]
    found += [f"modelSpec.{key}: the chart has no such key" for key in model if key not in known]
    found += [
        f"modelSpec.vllmConfig.{key}: the chart has no such key"
        for key in model["vllmConfig"]
        if key not in known["vllmConfig"]["properties"]
    ]
    crd = crd_schema(stack / "helm" / "crds" / "crd-lora-adapter.yaml")
    for adapter in given["loraAdapters"]:
        fields = ("baseModel", "adapterSource", "loraAdapterDeploymentConfig")
        made = {
            "apiVersion": "production-stack.vllm.ai/v1alpha1",
            "kind": "LoraAdapter",
            "metadata": {"name": adapter["name"]},
            "spec": {key: adapter[key] for key in fields},
        }
        found += problems(crd, made)
    return found


def check_rayservice(kuberay: Path) -> list[str]:
    """The RayService, and the Serve config in it."""
    from ray.serve.schema import ServeDeploySchema

    from soka_serve.serving.replicas import ReplicaOptions

    given = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    crd = crd_schema(kuberay / "helm-chart" / "kuberay-operator" / "crds" / "ray.io_rayservices.yaml")
    found = problems(crd, given)
    config = yaml.safe_load(given["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    ReplicaOptions.model_validate(config["applications"][0]["args"])
    return found


def commit_of(clone: Path) -> str:
    """The commit of a clone."""
    done = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    """Command line."""
    parser = make_parser("eval.checks.kubernetes", __doc__)
    parser.add_argument("--stack", type=Path, required=True, help="clone of vllm-project/production-stack")
    parser.add_argument("--kuberay", type=Path, required=True, help="clone of ray-project/kuberay")
    options = parser.parse_args()
    problems_of = {
        "deploy/production-stack.yaml": check_stack(options.stack),
        "deploy/rayservice.yaml": check_rayservice(options.kuberay),
    }
    found = {
        "production_stack_commit": commit_of(options.stack),
        "kuberay_commit": commit_of(options.kuberay),
        "problems": problems_of,
    }
    print(json.dumps(write_record(options, found, packages=versions_of("jsonschema", "ray")), indent=1))
    if any(problems_of.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
