"""A decoupled actor-critic loop: rank 0 plays, the others train; two groups, objects and tensors between them."""

import argparse
import datetime

import torch
import torch.distributed as dist
from torch import nn

from fabric_lite import Fabric
from fabric_lite.plugins.collectives import TorchCollective
from fabric_lite.utilities import rank_zero_only
from fabric_lite.wrappers import _FabricModule


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(4, 16), nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, observation):
        hidden = torch.tanh(self.body(observation))
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class Game:
    """The action is right when it tells the sign of the first number."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.observations = torch.randn(32, 4, generator=self.generator)

    def step(self, actions):
        rewards = (actions == (self.observations[:, 0] > 0).long()).float()
        self.observations = torch.randn(32, 4, generator=self.generator)
        return self.observations, rewards


def flat(model):
    return nn.utils.convert_parameters.parameters_to_vector(model.parameters())


def player(fabric, world_collective, player_trainer_collective, updates):
    agent = Agent()
    weights = flat(agent).detach().clone()
    player_trainer_collective.broadcast(weights, src=1)
    nn.utils.convert_parameters.vector_to_parameters(weights, agent.parameters())
    game, returns = Game(0), []
    observation = game.observations
    for _ in range(updates):
        rollout = {"observation": [], "action": [], "reward": []}
        for _ in range(4):
            with torch.no_grad():
                logits, _ = agent(observation)
            action = torch.distributions.Categorical(logits=logits).sample()
            following, reward = game.step(action)
            for name, value in zip(rollout, (observation, action, reward), strict=True):
                rollout[name].append(value)
            observation = following
        data = {name: torch.cat(values) for name, values in rollout.items()}
        returns.append(data["reward"].mean().item())
        trainers = fabric.world_size - 1
        chunks = [{name: value.chunk(trainers)[i] for name, value in data.items()} for i in range(trainers)]
        world_collective.scatter_object_list([None], [None, *chunks], src=0)
        player_trainer_collective.broadcast(weights, src=1)
        nn.utils.convert_parameters.vector_to_parameters(weights, agent.parameters())
    world_collective.scatter_object_list([None], [None] + [-1] * (fabric.world_size - 1), src=0)
    return returns


def trainer(fabric, world_collective, player_trainer_collective, optimization_pg):
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    model = nn.parallel.DistributedDataParallel(agent, process_group=optimization_pg.group)
    if fabric.global_rank == 1:
        player_trainer_collective.broadcast(flat(agent).detach().clone(), src=1)
    while True:
        data = [None]
        world_collective.scatter_object_list(data, [None] * fabric.world_size, src=0)
        if data[0] == -1:
            return
        logits, values = model(data[0]["observation"])
        advantages = data[0]["reward"] - values
        log_probability = torch.distributions.Categorical(logits=logits).log_prob(data[0]["action"])
        loss = -(log_probability * advantages.detach()).mean() + advantages.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gathered = [torch.zeros(()) for _ in range(optimization_pg.world_size)]
        optimization_pg.all_gather(gathered, loss.detach())
        if fabric.global_rank == 1:
            player_trainer_collective.broadcast(flat(agent).detach().clone(), src=1)


def decoupled(fabric, updates):
    world_collective = TorchCollective()
    player_trainer_collective = TorchCollective()
    world_collective.setup(backend="gloo", timeout=datetime.timedelta(days=1))
    world_collective.create_group(timeout=datetime.timedelta(days=1))
    player_trainer_collective.create_group(ranks=[0, 1], timeout=datetime.timedelta(days=1))
    optimization_pg = TorchCollective().create_group(ranks=list(range(1, fabric.world_size)))
    returns = (
        player(fabric, world_collective, player_trainer_collective, updates)
        if fabric.global_rank == 0
        else trainer(fabric, world_collective, player_trainer_collective, optimization_pg)
    )
    world_collective.barrier()
    for collective in (optimization_pg, player_trainer_collective, world_collective):
        collective.teardown()
    return returns


def coupled(fabric, updates):
    """All ranks play and train; advantages are normalized over all of them."""
    agent, optimizer = Agent(), None
    agent = fabric.setup_module(agent)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(agent.parameters(), lr=1e-2))
    assert isinstance(agent, _FabricModule)
    game, returns = Game(fabric.global_rank), []
    for _ in range(updates):
        observation = game.observations
        logits, values = agent(observation)
        distribution = torch.distributions.Categorical(logits=logits)
        action = distribution.sample()
        _, reward = game.step(action)
        gathered = fabric.all_gather(reward)
        advantages = (reward - gathered.mean()) / (gathered.std() + 1e-8)
        loss = -(distribution.log_prob(action) * advantages).mean() + (values - reward).square().mean()
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        fabric.clip_gradients(agent, optimizer, max_norm=0.5)
        optimizer.step()
        returns.append(gathered.mean().item())
    return fabric.broadcast(returns, src=0)


@rank_zero_only
def report(kind, returns):
    print(f"{kind}: from {sum(returns[:10]) / 10:.2f} to {sum(returns[-10:]) / 10:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=60)
    args = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices="auto")
    fabric.launch()
    fabric.seed_everything(5 + fabric.global_rank)
    report("coupled", coupled(fabric, args.updates))
    if fabric.world_size > 1:
        assert dist.is_initialized()
        report("decoupled", decoupled(fabric, args.updates))
